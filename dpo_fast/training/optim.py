"""fp32 masters of compute-dtype weights, their optimizers, loss scaling, and updates skipped on the device.

The module holds its trainable parameters in the compute dtype. Each has an fp32 master, which the optimizer updates and
which is then rounded into the module. Micro-batch gradients are summed in fp32 in the masters' `grad`. With fp32 as the
compute dtype a parameter is its own master, so nothing is copied (except for 8-bit Adam, which needs another memory
order).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput, missing_extra
from dpo_fast.parallel import Ranks

# Diffusion-DPO's gradients carry a factor of beta/4, so they are far larger than those the usual 2^16 is meant for.
INITIAL_LOSS_SCALE = 2.0**8
LOSS_SCALE_GROWTH_INTERVAL = 1000  # finite updates before the scale doubles; one overflow halves it

COUNTERS = ("loss_scale", "good_updates", "skipped", "skipped_in_a_row")  # attributes that a checkpoint keeps


class MasterOptimizer:
    """The trained state of a run: masters, optimizer, loss scale and EMA.

    `parameters` are name -> fp32 parameter of the module; they are cast to `dtype` here, after the masters are copied,
    so the masters start exactly at the checkpoint's fp32 weights. Raises BadInput if `lr` is too low for the schedule.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], dtype: torch.dtype, config: TrainConfig, *, lr: float, steps: int
    ) -> None:
        assert parameters and all(p.dtype == torch.float32 for p in parameters.values())
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        reordered = config.optimizer == "adamw8bit"  # bitsandbytes makes what it updates contiguous: a UNet is not
        if dtype == torch.float32 and not reordered:
            self.masters = self.parameters
        else:
            layout = torch.contiguous_format if reordered else torch.preserve_format
            self.masters = [nn.Parameter(p.detach().clone(memory_format=layout)) for p in self.parameters]
            for parameter in self.parameters:
                parameter.data = parameter.data.to(dtype)
        device = self.masters[0].device
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = _optimizer(self.masters, config, lr)
        self._schedule = rate_schedule(config, lr, steps)
        self.base_lr = lr
        self.scaled = dtype == torch.float16
        self.loss_scale = torch.tensor(INITIAL_LOSS_SCALE if self.scaled else 1.0, device=device)
        self.good_updates = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)  # updates skipped since the run began
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.ema = [m.detach().clone() for m in self.masters] if config.use_ema else None
        self.ema_decay = config.ema_decay

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step `step` (the first is 0)."""
        return self.base_lr * self._schedule(step)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the module's half-precision gradients to the masters' fp32 ones, and free them.

        Raises BadInput for a parameter that no gradient reaches (an adapter on a module that is not run).
        """
        half = [p.grad for p in self.parameters]
        if any(grad is None for grad in half):
            unused = [name for name, grad in zip(self.names, half, strict=True) if grad is None]
            raise BadInput(f"no gradient reaches {unused[0]} ({len(unused)} such in all); mend --lora_targets")
        if self.masters is self.parameters:
            return
        if self.masters[0].grad is None:
            for master in self.masters:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_(self.gradients(), half)
        else:
            torch._foreach_add_(self.gradients(), half)
        for parameter in self.parameters:
            parameter.grad = None

    def drop_gradients(self) -> None:
        """Discard the gradients accumulated since the last step."""
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """The masters' fp32 gradients, in the order of `names`."""
        return [m.grad for m in self.masters]

    def reduce(self, ranks: Ranks, *extra: torch.Tensor) -> None:
        """Sum the masters' gradients and the `extra` fp32 tensors over the ranks, in place. Call this before `step`."""
        ranks.sum_([*self.gradients(), *extra], like=[*self.masters, *extra])

    @torch.no_grad()
    def step(self, step: int, loss: torch.Tensor, parts: int) -> torch.Tensor:
        """Clip and apply the gradients, sums over `parts` micro-batches. Returns the norm of their mean, fp32 [].

        If a gradient or `loss` is not finite, weights and optimizer state stay unchanged; AdamW decides on the device.
        """
        gradients = self.gradients()
        unscale = 1.0 / (self.loss_scale * parts)
        norm = torch.nn.utils.get_total_norm(gradients) * unscale
        found_inf = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_grad_norm else 1.0
        torch._foreach_mul_(gradients, unscale * clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        if isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.found_inf = found_inf
            self.optimizer.step()
        elif not found_inf.item():  # the others cannot skip on the device: one wait per optimizer step
            self.optimizer.step()
        self._count(found_inf)
        for master in self.masters:
            master.grad = None
        self.write_back()
        if self.ema is not None:
            decay = min(self.ema_decay, (1 + step) / (10 + step))  # TensorFlow's warm-up: early averages decay faster
            torch._foreach_lerp_(self.ema, self.masters, 1.0 - decay)
        return norm

    def _count(self, found_inf: torch.Tensor) -> None:
        self.skipped += found_inf
        self.skipped_in_a_row = (self.skipped_in_a_row + found_inf) * found_inf
        if self.scaled:
            self.good_updates = (self.good_updates + 1) * (1 - found_inf)
            grow = (self.good_updates >= LOSS_SCALE_GROWTH_INTERVAL).float()
            self.good_updates *= 1 - grow
            self.loss_scale *= (1 - 0.5 * found_inf) * (1 + grow)

    @torch.no_grad()
    def write_back(self, source: list[torch.Tensor] | None = None) -> None:
        """Round the masters (or `source`, e.g. the EMA) into the module."""
        source = self.masters if source is None else source
        if source is not self.parameters:
            torch._foreach_copy_(self.parameters, source)

    @contextmanager
    def showing_export(self) -> Iterator[None]:
        """Within the block the module holds the weights of `export`, in the compute dtype. Do not train in it."""
        if self.ema is None:
            yield
            return
        trained = self.masters if self.masters is not self.parameters else [p.detach().clone() for p in self.masters]
        self.write_back(self.ema)
        try:
            yield
        finally:
            self.write_back(trained)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return name -> fp32 master."""
        return {n: m.detach() for n, m in zip(self.names, self.masters, strict=True)}

    def export(self) -> dict[str, torch.Tensor]:
        """Return name -> fp32 weight to publish: the EMA if there is one, else the masters."""
        return self.weights() if self.ema is None else dict(zip(self.names, self.ema, strict=True))

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, object]]:
        """Return everything that a resumed run needs: files of named tensors, and plain values."""
        tensors, values = {}, {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in _flat(state, self.names[index]):
                (tensors if isinstance(value, torch.Tensor) else values)[key] = value
        files = {"weights": self.weights(), "optimizer": tensors, "counters": self._counters()}
        if self.ema is not None:
            files["ema"] = dict(zip(self.names, self.ema, strict=True))
        return files, values

    def _counters(self) -> dict[str, torch.Tensor]:
        """The loss scale and the counts of updates, fp32 [] on the device."""
        return {name: getattr(self, name) for name in COUNTERS}

    @torch.no_grad()
    def load_state(self, files: dict[str, dict[str, torch.Tensor]], values: dict[str, object]) -> None:
        """Restore what `state` returned; the tensors may be on the CPU."""
        torch._foreach_copy_(self.masters, [files["weights"][n] for n in self.names])
        if self.ema is not None:
            torch._foreach_copy_(self.ema, [files["ema"][n] for n in self.names])
        position = {name: index for index, name in enumerate(self.names)}
        states: dict[int, dict[str, object]] = {}
        for name, counter in self._counters().items():
            counter.copy_(files["counters"][name])
        for key, value in (files["optimizer"] | values).items():
            name, *path, entry = key.split("|")
            index = position[name]
            if isinstance(value, torch.Tensor) and value.shape == self.masters[index].shape:
                # in the master's memory order: fused optimizers read both as flat arrays
                value = torch.empty_like(self.masters[index], dtype=value.dtype, device=value.device).copy_(value)
            place = states.setdefault(index, {})
            for part in path:
                place = place.setdefault(part, {})
            place[entry] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.write_back()


def rate_of(config: TrainConfig) -> float:
    """Return the learning rate after the warm-up, of a configuration whose `pairs_per_step` is known."""
    return config.learning_rate * (config.pairs_per_step if config.scale_lr else 1)


def rate_schedule(config: TrainConfig, lr: float, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate `lr` at each of `steps` optimizer steps, the first of which is 0.

    It is a pure function of the step, so no state of it has to be saved. Raises BadInput if `lr` is too low for it.
    """
    try:
        return get_scheduler(
            config.lr_scheduler,
            torch.optim.SGD([torch.zeros(1)], lr=lr),
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        ).lr_lambdas[0]
    except ValueError as error:  # the polynomial schedule ends at 1e-7 and must start above that
        raise BadInput(f"--lr_scheduler {config.lr_scheduler} at learning rate {lr:g}: {error}") from error


def check_optimizer(config: TrainConfig, steps: int) -> None:
    """Raise BadInput for an optimizer that is not installed, and for a learning rate too low for its schedule."""
    rate_schedule(config, rate_of(config), steps)
    if config.optimizer == "adamw8bit":
        _adamw8bit()


def _flat(state: dict[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    """The leaves of nested dictionaries (8-bit states nest) as `prefix|key|key`, value."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}|{key}")
        else:
            yield f"{prefix}|{key}", value


def _optimizer(masters: list[nn.Parameter], config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # At the given rate, without its own schedule or parameter scaling, as the paper's authors run it for SDXL.
        return Adafactor(
            masters, lr=lr, weight_decay=config.adam_weight_decay, scale_parameter=False, relative_step=False
        )
    options = dict(
        lr=lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    if config.optimizer == "adamw8bit":
        return _adamw8bit()(masters, **options)
    return torch.optim.AdamW(masters, fused=True, **options)


def _adamw8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise missing_extra("bitsandbytes", "gpu", "--optimizer adamw8bit (--use_8bit_adam)") from error
    return AdamW8bit
