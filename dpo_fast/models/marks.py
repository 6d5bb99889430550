"""What a model's files say about how it was trained, apart from the weights: prediction type, zero terminal SNR, EDM.

A single file has no scheduler, so finetunes of SD and SDXL carry marks that ComfyUI, A1111 and Forge read: the keys
`v_pred` and `ztsnr` (NoobAI-XL; often empty tensors), `edm_mean` and `edm_std` (Playground v2.5), `edm_vpred.sigma_max`
(CosXL), and in the header's metadata `modelspec.prediction_type` (epsilon or v) and `modelspec.architecture`. In a
folder, the scheduler's config takes their place. A flag overrides a mark, and a mark overrides the config that a single
file is read with.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dpo_fast.errors import BadInput

logger = logging.getLogger(__name__)

V_PRED, ZTSNR = "v_pred", "ztsnr"  # keys, of empty tensors, that ComfyUI and Forge look for
_EDM = {
    "edm_mean": "Playground v2.5",
    "edm_std": "Playground v2.5",
    "edm_vpred.sigma_max": "CosXL",
    "edm_vpred.sigma_min": "CosXL",
}
_WORDS = {
    "epsilon": ("epsilon", "eps"),
    "v_prediction": ("v", "v_prediction", "v-prediction", "v_pred", "vpred"),
}


@dataclass(frozen=True)
class Marks:
    """What the files declare, and the key that declares it; None where they declare nothing."""

    prediction_type: str | None = None  # "epsilon" or "v_prediction"; a scheduler may have others
    prediction_type_by: str = ""
    zero_terminal_snr: bool | None = None
    zero_terminal_snr_by: str = ""


def refuse_edm(path: str, names: Collection[str]) -> None:
    """Raise BadInput if the tensor `names` of a single file mark it as trained with EDM."""
    for key, model in _EDM.items():
        if key in names:
            raise BadInput(
                f"{path} has the key {key}: it was trained with EDM's continuous noise levels, like {model}, which is"
                " not supported; use a base model that was trained with epsilon or v-prediction"
            )


def marks_of_file(path: str, names: Collection[str], metadata: Mapping[str, str], prediction_type: str | None) -> Marks:
    """Return the marks in the tensor names and metadata of a single file.

    Raises BadInput for a prediction type that cannot be trained and for contradictory marks, unless the flag
    `prediction_type` is given, which decides.
    """
    says: dict[str, list[str]] = {}  # prediction type -> what says so
    if V_PRED in names:
        says.setdefault("v_prediction", []).append(f"key {V_PRED}")
    word = str(metadata.get("modelspec.prediction_type", "")).strip().lower()
    if word:
        kind = next((kind for kind, words in _WORDS.items() if word in words), None)
        if kind is None and prediction_type is None:
            raise BadInput(
                f"{path} says modelspec.prediction_type {word!r}, which is not supported; if it is wrong, say"
                " --prediction_type epsilon or v_prediction, else use another base model"
            )
        says.setdefault(kind or word, []).append(f"modelspec.prediction_type {word}")
    architecture = str(metadata.get("modelspec.architecture", "")).strip().lower()
    if architecture.startswith("stable-diffusion-v2-768-v"):
        says.setdefault("v_prediction", []).append(f"modelspec.architecture {architecture}")
    if len(says) > 1 and prediction_type is None:
        claims = " but ".join(f"{', '.join(by)} for {kind}" for kind, by in says.items())
        raise BadInput(f"{path} contradicts itself ({claims}): say --prediction_type epsilon or v_prediction")
    kind, by = next(iter(says.items()), (None, []))
    return Marks(kind, ", ".join(by), True if ZTSNR in names else None, f"key {ZTSNR}")


def marks_of_scheduler(config: Mapping) -> Marks:
    """Return the marks in the config of a pipeline's scheduler."""
    return Marks(
        config.get("prediction_type", "epsilon"),
        "scheduler's prediction_type",
        bool(config.get("rescale_betas_zero_snr", False)),
        "scheduler's rescale_betas_zero_snr",
    )


def reconcile(
    path: str, marks: Marks, scheduler: Marks, prediction_type: str | None, zero_terminal_snr: str
) -> tuple[str | None, str]:
    """Return the flags `prediction_type` and `zero_terminal_snr`, with the marks filled in where a flag is not set.

    Anything but plain epsilon-prediction is logged in one line, with the key that declares it, and so is a flag that
    contradicts a mark. scheduler: the marks of the pipeline's scheduler, which apply where the file has none.
    """
    said = []
    model = marks if marks.prediction_type is not None else scheduler
    if prediction_type is not None and prediction_type != model.prediction_type:
        if model is marks or model.prediction_type != "epsilon":
            said.append(f"--prediction_type {prediction_type}, against its {model.prediction_type_by}")
    elif model.prediction_type == "v_prediction" or model.prediction_type != scheduler.prediction_type:
        said.append(f"{model.prediction_type} ({model.prediction_type_by})")
    chosen = prediction_type or marks.prediction_type

    model = marks if marks.zero_terminal_snr is not None else scheduler
    if model.zero_terminal_snr and zero_terminal_snr == "off":
        said.append(f"--zero_terminal_snr off, against its {model.zero_terminal_snr_by}")
    elif model.zero_terminal_snr:
        said.append(f"zero terminal SNR ({model.zero_terminal_snr_by})")
    if zero_terminal_snr == "auto" and marks.zero_terminal_snr:
        zero_terminal_snr = "on"

    if said:
        logger.info("%s: trained with %s", path, ", ".join(said))
    return chosen, zero_terminal_snr
