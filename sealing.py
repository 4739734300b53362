"""Seal what turns locked images back into the originals, so that only those who hold a key can unlock them.

A locked image and its original differ by a residual, which is compressed and encrypted with AES-256-GCM. The
encryption is authenticated, together with what the residual belongs to: a wrong key, or one changed bit, is noticed.
"""

import hashlib
import os
import zlib
from pathlib import Path

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from utils import UserError, write_file

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16
CHUNK_BYTES = 2**30  # AESGCM takes less than 2**31 bytes at once


def read_key(path):
    """The key in a file of 64 hexadecimal digits; raises UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such key file")
    try:
        key = bytes.fromhex(Path(path).read_text())
    except ValueError:  # also for a file that is no text
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(f"{path}: not a key file: expected {2 * KEY_BYTES} hexadecimal digits")
    return key


def make_key(path):
    """The key in a file, which is written with a new one, readable for its owner alone, if it does not exist."""
    if not Path(path).exists():
        write_file(path, AESGCM.generate_key(8 * KEY_BYTES).hex().encode() + b"\n", mode=0o600)
    return read_key(path)


def fingerprint(key):
    """What tells keys apart, and does not help to find one."""
    return hashlib.sha256(b"adversarial lock " + key).hexdigest()[:16]


def seal(originals, locked, key, context):
    """The residual of images uint8 of one shape, compressed and encrypted, as bytes.

    context is a text that unseal must be given too. Each call draws new nonces, so its bytes are never the same.
    """
    residual = zlib.compress((originals - locked).numpy().tobytes(), level=1)  # uint8 wraps around, here and back
    chunks = [residual[start : start + CHUNK_BYTES] for start in range(0, len(residual), CHUNK_BYTES)]
    sealed = []
    for index, chunk in enumerate(chunks):
        nonce = os.urandom(NONCE_BYTES)
        sealed += [nonce, AESGCM(key).encrypt(nonce, chunk, f"{context} {index} of {len(chunks)}".encode())]
    return b"".join(sealed)


def unseal(sealed, locked, key, context):
    """The original images, from the bytes of seal and locked images uint8; raises UserError where anything differs."""
    step = NONCE_BYTES + CHUNK_BYTES + TAG_BYTES
    chunks = [sealed[start : start + step] for start in range(0, len(sealed), step)]
    residual = []
    try:
        for index, chunk in enumerate(chunks):
            nonce, encrypted = chunk[:NONCE_BYTES], chunk[NONCE_BYTES:]
            residual.append(AESGCM(key).decrypt(nonce, encrypted, f"{context} {index} of {len(chunks)}".encode()))
        residual = torch.frombuffer(bytearray(zlib.decompress(b"".join(residual))), dtype=torch.uint8)
    except (InvalidTag, ValueError, zlib.error) as error:
        raise UserError(f"cannot unlock {context}: the key is another, or a file was changed") from error
    return locked + residual.view_as(locked)
