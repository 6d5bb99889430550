"""Contents that carry their own digest, so that a byte that changed on the disk is noticed when they are read."""

import hashlib

_MARK = ',"digest":"'


def digest(data: bytes) -> str:
    """64 bits in hexadecimal."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def signed(text: str) -> str:
    """A JSON object's text with its digest as the last member."""
    return f'{text[:-1]}{_MARK}{digest(text.encode())}"}}\n'


def unsigned(text: str) -> str:
    """The text that `signed` was given. Raises ValueError where it has changed."""
    text, _, rest = text.rpartition(_MARK)
    text += "}"
    if rest != f'{digest(text.encode())}"}}\n':
        raise ValueError("its contents do not agree with their digest")
    return text
