"""Read files of weights from a disk, a storage or the web.

Nothing in a file is ever executed: torch.load(weights_only=True) or safetensors reads it. What
is downloaded is kept in the cache folder, under names that hold the address's digest and the
content's, so a damaged or half-written copy is noticed and fetched again.
"""

import hashlib
import http.client
import io
import logging
import re
import string
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nasray.errors import UserError
from nasray.progress import progress
from nasray.storage import files as storage

TIMEOUT_S = 60.0  # without an answer, or without the next bytes of one
CHUNK_BYTES = 1 << 20
# Under what training programs store the weights; of several, the first of this list is taken.
STATES = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state")
# What DataParallel, torch.compile and Lightning put before the name of every tensor.
WRAPPERS = ("module.", "_orig_mod.", "model.")
AVERAGED = "n_averaged"  # beside the tensors of torch's AveragedModel: how many steps it averages
NOT_ALONE = "save its weights alone, torch.save({'state_dict': network.state_dict()}, ...)"

log = logging.getLogger(__name__)


def read_state(path: str, sha256: str = "") -> dict[str, Tensor]:
    """Read tensors by name from a local file, a URI of a storage, or an http(s) address.

    The file is one of torch.save, with the tensors themselves or under a key of STATES, or one
    of safetensors. A prefix of WRAPPERS that all names share is left out.

    Args:
        path: of the file.
        sha256: the digest that the file must have, in hexadecimal, if given.

    Raises:
        UserError: the file cannot be read, has another digest, or does not hold tensors by name.
    """
    content, _ = read_content(path, sha256)
    return state_of(content, path)


def read_content(path: str, sha256: str = "") -> tuple[Any, str]:
    """Read what a file of weights holds, tensors on the CPU, and its SHA-256 in hexadecimal.

    Arguments and errors as above.
    """
    sha256 = sha256.lower()
    if sha256 and (len(sha256) != 64 or set(sha256) - set(string.hexdigits)):
        raise UserError(f"sha256 = {sha256!r} must be 64 hexadecimal digits, or be left out")
    content = _fetched(path, sha256) if storage.is_url(path) else _stored(path)
    digest = _digest(content)
    if sha256 not in ("", digest):
        raise UserError(
            f"{path} has the SHA-256 {digest}, not {sha256}; fetch the file again, or correct the "
            "digest"
        )
    return _parsed(content, path), digest


def state_of(content: Any, path: str) -> dict[str, Tensor]:
    """Find the tensors by name in the content of a file; `path` names it in errors.

    Raises:
        UserError: there are none.
    """
    state = content
    while isinstance(state, dict):
        keys = [key for key in STATES if isinstance(state.get(key), dict)]
        if not keys:
            break
        if len(keys) > 1:
            log.info("%s holds %s; %s is taken", path, " and ".join(keys), keys[0])
        state = state[keys[0]]
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds no tensors by name; {NOT_ALONE}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path} holds {name!r} of type {type(value).__name__} where only tensors by "
                f"name can be; {NOT_ALONE}"
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "meta" if value.is_meta else "sparse"
            raise UserError(
                f"{path} holds {name!r} as a {kind} tensor; save its values, in floating point"
            )
    found = {name: value.detach() for name, value in state.items() if name != AVERAGED}
    if not found:
        raise UserError(f"{path} holds no tensors by name; {NOT_ALONE}")
    while prefix := next((each for each in WRAPPERS if all(n.startswith(each) for n in found)), ""):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _stored(path: str) -> bytes:
    """Read a file on a disk or a storage."""
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; give the path of a file of weights")
    try:
        return storage.read(path)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}); give a file of weights") from None


def _fetched(url: str, sha256: str) -> bytes:
    """Read a file from the web, or as it was kept of an earlier download."""
    folder = storage.join(storage.cache_folder(), "weights")
    address = hashlib.sha256(url.encode()).hexdigest()[:32]
    kept = [name for name in _names(folder) if name.startswith(address)]
    for name in kept:
        content = storage.read(storage.join(folder, name))
        found = _digest(content)
        if name == f"{address}-{found}" and sha256 in ("", found):
            log.info("%s was downloaded before, to %s", url, storage.join(folder, name))
            return content
    content = _downloaded(url)
    if sha256 in ("", _digest(content)):
        try:
            for name in kept:  # what the address held before
                storage.remove(storage.join(folder, name))
            storage.write(storage.join(folder, f"{address}-{_digest(content)}"), content)
        except OSError as error:
            log.warning("%s is not kept in %s: %s; set NASRAY_CACHE", url, folder, error.strerror)
    return content


def _names(folder: str) -> list[str]:
    try:
        return storage.list_names(folder)
    except OSError:
        return []


def _downloaded(url: str) -> bytes:
    """Download a whole file."""
    content = bytearray()
    try:
        # Some servers refuse the name that urllib gives itself. An opener of its own follows the
        # proxies that the environment names now; urlopen() follows those of its first call.
        request = urllib.request.Request(url, headers={"User-Agent": "nasray"})
        with urllib.request.build_opener().open(request, timeout=TIMEOUT_S) as response:
            length = response.length  # None where the server does not say
            size = f"{length / 1e6:.1f} MB" if length else "size not told"
            log.info("downloading %s (%s)", url, size)
            for chunk in _shown(response, length):
                content += chunk
        if length is not None and len(content) != length:
            raise http.client.IncompleteRead(b"", length - len(content))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        text = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else f"{reason}"
        raise UserError(
            f"{url} could not be downloaded ({' '.join(text.split())}); try again, or download it "
            "by other means and give the path of the file instead"
        ) from None
    return bytes(content)


def _shown(response: http.client.HTTPResponse, length: int | None) -> Iterator[bytes]:
    """Yield the chunks of an answer, with progress in MB if its length is known."""
    done = 0
    with progress("download, MB", -(-(length or 0) // CHUNK_BYTES)) as show:
        while chunk := response.read(CHUNK_BYTES):
            done += len(chunk)
            if length:
                show(-(-done // CHUNK_BYTES), "")
            yield chunk


def _parsed(content: bytes, path: str) -> Any:
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content):
        return _safetensors(content, path)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file, whatever its bytes lead to
        raise UserError(f"{path} is no readable file of weights ({_why(content, error)}") from None


def _why(content: bytes, error: Exception) -> str:
    """Say why torch.load refused a file; the fix follows a closing bracket."""
    text = str(error)
    if refused := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds more than tensors: {refused[1]}); {NOT_ALONE}"
    if "TorchScript" in text:
        return f"it is a TorchScript archive); {NOT_ALONE}"
    if content[:512].lstrip()[:1] == b"<":
        return "it is a web page); give the address of the file itself, or its path"
    if content.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer); fetch the file itself with `git lfs pull`"
    reason = " ".join(text.split()).split(". ")[0].removesuffix(".")
    if not isinstance(error, RuntimeError) or not text:  # RuntimeErrors are torch's own
        reason = "it is damaged, or not written by torch.save or safetensors"
    return f"{reason[:200]}); fetch it again"


def _safetensors(content: bytes, path: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load
    except ImportError:
        raise UserError(
            f"{path} is a file of safetensors, which is not installed: pip install safetensors"
        ) from None
    try:
        return load(content)
    except Exception as error:
        raise UserError(
            f"{path} is no readable file of weights ({error}); fetch it again"
        ) from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
