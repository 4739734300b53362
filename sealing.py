"""Seal what turns locked images back into the originals, so that only those who hold a key can unlock them.

A locked image and its original differ by a residual, which is compressed and encrypted with AES-256-GCM, together
with labels, classes and names. The encryption is authenticated: a wrong key, or one changed bit, is noticed.
"""

import hashlib
import json
import os
import zlib
from pathlib import Path

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from data import Split
from lockfiles import hash_tensor
from utils import UserError, naming, read_file

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16
CHUNK_BYTES = 2**30  # AESGCM takes less than 2**31 bytes at once


def read_key(path):
    """The key in a file of 64 hexadecimal digits; raises UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file, or a folder; name the key that --key-out wrote")
    try:
        key = bytes.fromhex(read_file(path).decode())
    except ValueError:  # also for a file that is no text
        key = b""
    if len(key) != KEY_BYTES:
        remedy = "" if Path(path).stat().st_size else "; it is empty, as a power cut may leave a new one: delete it"
        raise UserError(f"{path}: not a key file: expected {2 * KEY_BYTES} hexadecimal digits{remedy}")
    return key


def make_key(path):
    """The key in a file; one that does not exist is written first, with a new key, for its owner alone to read."""
    try:
        # exclusively, since another process may be making it too: what it seals with must be what the file holds
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return read_key(path)
    except FileNotFoundError as error:
        raise UserError(f"--key-out {path}: the folder for it does not exist; make it, or name another") from error
    try:
        with naming(path), open(descriptor, "wb") as file:
            file.write(AESGCM.generate_key(8 * KEY_BYTES).hex().encode() + b"\n")
            file.flush()
            os.fsync(descriptor)
    except BaseException:  # Ctrl-C too: what it leaves would be no key
        os.unlink(path)
        raise
    return read_key(path)


def fingerprint(key):
    """What tells keys apart, and does not help to find one."""
    return hashlib.sha256(b"adversarial lock " + key).hexdigest()[:16]


def seal(original, locked, key, context):
    """A Split as bytes that only the key opens: what its images differ by from the locked ones, and all else of it.

    locked uint8 [N, 3, H, W]; context is a text that unseal must be given too. Each call draws new nonces, so its
    bytes are never the same.
    """
    about = {
        "images_sha256": hash_tensor(original.images),
        "labels": original.labels.tolist(),
        "classes": original.classes,
        "names": original.names,
    }
    packer = zlib.compressobj(level=1)
    parts = [packer.compress(json.dumps(about).encode() + b"\n")]
    for images, others in zip(original.images.split(1000), locked.split(1000)):  # few, to spare memory
        parts.append(packer.compress((images - others).contiguous().numpy()))  # uint8 wraps around, here and back
    content = memoryview(b"".join([*parts, packer.flush()]))
    chunks = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
    sealed = []
    for index, chunk in enumerate(chunks):
        nonce = os.urandom(NONCE_BYTES)
        sealed += [nonce, AESGCM(key).encrypt(nonce, chunk, f"{context} {index} of {len(chunks)}".encode())]
    return b"".join(sealed)


def unseal(sealed, locked, key, context):
    """The original Split, from the bytes of seal and locked images uint8; raises UserError where anything differs."""
    step = NONCE_BYTES + CHUNK_BYTES + TAG_BYTES
    chunks = [sealed[start : start + step] for start in range(0, len(sealed), step)]
    content = []
    try:
        for index, chunk in enumerate(chunks):
            nonce, encrypted = chunk[:NONCE_BYTES], chunk[NONCE_BYTES:]
            content.append(AESGCM(key).decrypt(nonce, encrypted, f"{context} {index} of {len(chunks)}".encode()))
        content = bytearray(zlib.decompress(b"".join(content)))
        end = content.index(b"\n") + 1
        residual = torch.frombuffer(content, dtype=torch.uint8, offset=end)
    except (InvalidTag, ValueError, zlib.error) as error:
        raise UserError(f"cannot unlock {context}: the key is another, or a file was changed") from error
    about = json.loads(content[:end])
    images = locked + residual.view_as(locked) if residual.numel() == locked.numel() else locked
    if hash_tensor(images) != about["images_sha256"]:
        raise UserError(f"cannot unlock {context}: the locked images are not those that were sealed")
    return Split(images, torch.tensor(about["labels"]), about["classes"], about["names"])
