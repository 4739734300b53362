"""What all modules share: user errors and flags, files, devices, provenance."""

import argparse
import copy
import difflib
import errno
import io
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from filelock import FileLock, Timeout
from tqdm import tqdm

# User errors


class UserError(Exception):
    """A mistake of the user's. The message is one line: the file, key or flag, and what to do about it."""


def command_name():
    """The name of the script that runs, or of the package, where it is run as one."""
    script = Path(sys.argv[0])
    return script.parent.name if script.name == "__main__.py" else script.name


class Parser(argparse.ArgumentParser):
    """An ArgumentParser of a script's docstring, whose errors are UserErrors, and that takes no abbreviated flags."""

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=command_name(), description=description, formatter_class=formatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        flag = "the first argument"
        for word in sys.argv[1:] if args is None else args:
            name, equals, value = word.partition("=")
            flag = name if name.startswith("--") else flag
            if not word or (name.startswith("--") and equals and not value):  # an unset shell variable
                raise UserError(f"{flag}: is empty; give it a value, or leave it out")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind, low, high=math.inf):
    """A converter of a flag's text to a finite number, int or float, from low to high."""
    span = f"from {low} to {high}" if high < math.inf else f"of at least {low}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value < math.inf):  # not so for NaN either
            raise argparse.ArgumentTypeError(f"'{text}' is not a {'whole ' if kind is int else ''}number {span}")
        return value + 0  # -0.0 becomes 0.0, as names of files hold it

    return parse


MAX_SEED = 2**32 - 1  # on a CPU torch.manual_seed takes no notice of further bits
parse_seed = number(int, 0, MAX_SEED)


def run_command(main, if_interrupted="nothing more was written"):
    """Call main(); a mistake of the user's becomes one line on standard error and exit code 2, Ctrl-C exit code 130."""
    threading.excepthook = quiet_excepthook
    if hasattr(sys.stdout, "reconfigure"):  # not where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may have letters that a terminal or a pipe has not
    try:
        _, message = attempt(main)
    except KeyboardInterrupt:
        if is_first():
            print(f"interrupted: {if_interrupted}", file=sys.stderr)
        sys.exit(130)
    if message is not None:
        print(f"{command_name()}: error: {message}", file=sys.stderr)
        sys.exit(2)


def is_first():
    """Whether this process is the first of torchrun's, or the only one: it says what all have to say."""
    return os.environ.get("RANK", "0") == "0"


def attempt(function, *args):
    """(what function(*args) returns, None), or (None, a line that tells the user of an error); a bug is raised."""
    try:
        return function(*args), None
    except Exception as error:
        if memory_is_full(error):
            return None, "the memory is full; take smaller batches, where nothing is begun, or end what else fills it"
        if isinstance(error, (UserError, OSError)):
            return None, printable(error)
        raise


def memory_is_full(error):
    """Whether an error says that a GPU or a CPU has no memory left, for a tensor or for anything else."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # what CUDA, cuBLAS, cuDNN and Triton need for themselves, and a CPU's tensors, are plain RuntimeErrors
    said = "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "DefaultCPUAllocator"
    return any(words in str(error) for words in said)


def is_damage(error):
    """Whether an error in reading a file says that it is absent or damaged, and not that it cannot be read just now."""
    if isinstance(error, OSError):  # what reads an archive that was cut short may seek to where there is nothing
        return error.errno in (None, errno.EINVAL, errno.ENOENT)
    return not memory_is_full(error)


@contextmanager
def telling_damage(tell):
    """Turn an error inside that means a damaged file (see is_damage) into a UserError with the text of tell(reason).

    A damaged file, or one of another kind, fails in many ways; all mean the same to the user.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_damage(error):
            raise
        raise UserError(tell(first_line(error))) from error


def quiet_excepthook(args):
    """Say nothing of an OSError in a thread: TensorBoard's writer raises it again in the main thread."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def first_line(error):
    """What an error says, short enough for a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0][:150]


def printable(text):
    """A text on one line, and without what would steer a terminal: some of it was read from files of others."""
    return "".join(character if character.isprintable() else " " for character in str(text))


def check_known(name, known, where):
    """Raise UserError, with the known names and the nearest, if name is none of them; where says what named it."""
    if name not in known:
        raise UserError(f"{where}: unknown name '{name}'; known are {listed(known)}{did_you_mean(name, known)}")


def listed(names):
    """Names as text, separated by commas; all of one folder, as torchvision/resnet18, as one: torchvision/NAME."""
    return ", ".join(dict.fromkeys(re.sub("/.*", "/NAME", name) for name in names))


def did_you_mean(word, known):
    """'; did you mean ...?', with the known names that end in the word, or else the nearest one; '' without any."""
    ends = [name for name in known if name.endswith((f"_{word}", f".{word}", f"/{word}"))]
    near = ends or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


# Files


@contextmanager
def naming(path):
    """Let every OSError inside name a file: this one, unless it names one already (that of a full disk does not)."""
    try:
        yield
    except BrokenPipeError:  # of what is printed, to a program that has ended
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(error.filename or path)) from error


def read_file(path):
    """The bytes of a file; an OSError names it."""
    with naming(path):
        return Path(path).read_bytes()


def write_file(path, content):
    """Put bytes in a file's place: the file is the old one or the new one, whole, whenever the power fails.

    An OSError names the file, or its temporary one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        try:
            temporary.unlink(missing_ok=True)  # a killed process leaves it behind
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def serialize(value):
    """What torch.save writes of tensors and plain values, as bytes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def load_whole(path):
    """What torch.save wrote, of tensors and plain values only, on the CPU; raises where the file is damaged.

    torch.load alone notices hardly any flipped bit: the checksums of the archive are compared here. (Files older than
    torch 1.6 are no archives, and have no checksums.) An OSError names the file.
    """
    with naming(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)


def sync_folder(path):
    """Bring the names in a folder to the disk; Windows does so by itself, and cannot be asked to."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems cannot
                raise
        finally:
            os.close(descriptor)


def in_threads(function, items, **progress):
    """function of each of a sequence of items, as a list in their order, by as many threads as torch has.

    Where it takes long, a progress bar of tqdm's options progress is shown, of torchrun's processes by the first.
    (The function should call nothing that torch runs in threads: each of these would start as many more.)
    """
    hidden = None if is_first() else True  # None: where the output is no terminal
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # block by block: in one go, as tqdm's thread_map does it, 200,000 items take 400 MB
        blocks = (items[start : start + 64] for start in range(0, len(items), 64))
        results = itertools.chain.from_iterable(pool.map(function, block) for block in blocks)
        return list(tqdm(results, total=len(items), delay=2, leave=False, disable=hidden, **progress))


def discard(folder, trash):
    """Delete a folder. It is renamed to trash first, so that no half-deleted folder ever has its old name."""
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        os.replace(folder, trash)
        shutil.rmtree(trash)


def lies_in(path, folder):
    """Whether a path lies in a folder, or is that folder, capitals aside: many disks do not tell them apart."""
    path, folder = (Path(os.path.realpath(each).lower()) for each in (path, folder))
    return path.is_relative_to(folder)


def make_folder(path):
    """Make a folder that files can be written to; raises UserError where that cannot be."""
    probe = Path(path, f".{os.getpid()}.tmp")  # tempfile would try more names, on Windows for hours
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be a folder to write to ({error.strerror}); name another") from error


def sync_disks():
    """Bring everything that was written to the disks, where the system can be asked to."""
    if hasattr(os, "sync"):
        os.sync()


@contextmanager
def exclusive(folder):
    """Make a folder, and keep other processes from writing to it meanwhile; raises UserError where one does already.

    The operating system lets go of it when the process ends, however it ends.
    """
    make_folder(folder)
    lock = FileLock(Path(folder, ".lock"), fallback_to_soft=False)  # a soft one would outlive a process that is killed
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: another process is writing there; wait for it, or name another folder") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
        # some network file systems
        print(f"{folder}: its file system cannot keep two processes apart; take care that only one writes there")
    try:
        yield
    finally:
        lock.release()


# Trees


def flatten(tree, prefix=""):
    """{'a': {'b': 1}} as {'a.b': 1}; an empty dict below a key stays one."""
    flat = {}
    for key, value in tree.items():
        below = isinstance(value, dict) and value
        flat.update(flatten(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value})
    return flat


def nest(flat):
    """{'a.b': 1} as {'a': {'b': 1}}, the inverse of flatten."""
    tree = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def differing(one, other):
    """{key of flatten: (value in one, value in other)} of what differs between two trees; absent counts as None."""
    one, other = flatten(one), flatten(other)
    pairs = {key: (one.get(key), other.get(key)) for key in one | other}
    return {key: (mine, its) for key, (mine, its) in pairs.items() if mine != its}


# Devices


def set_up_device(use_gpu=True):
    """Set up the device to compute on; returns it and why, as a pair (torch.device, str). Processes share the GPUs by
    LOCAL_RANK.

    From here on, no GPU rounds what it multiplies to TF32: float32 means float32. And cuDNN tries which of its
    algorithms is the fastest, which repays where all batches are alike; but its attention is not used.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # torch 2.9's fails in CUDA graphs (pytorch issue 169849)
    with warnings.catch_warnings():  # torch 2.9 announces another way, which earlier versions do not have
        warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # it is off on purpose
    if use_gpu and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device, torch.cuda.get_device_name()
    threads = f"{torch.get_num_threads()} threads"
    return torch.device("cpu"), f"{threads}, no CUDA GPU was found" if use_gpu else threads


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_precision(name, device, model, begun=None):
    """The precision to compute a model in, one of PRECISIONS, and why, as a pair; name is one of them, or auto: that
    in which the work was begun, where it was, and else what suits the device and the model."""
    if name != "auto":
        return name, "as asked for"
    if begun:
        return begun, "as it was begun"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "bfloat16", "this GPU multiplies matrices faster in it"
        if torch.cuda.get_device_capability(device) >= (7, 0):
            return "float16", "this GPU multiplies matrices faster in it, and has no bfloat16"
        return "float32", "half precision is no faster on this GPU"
    if (unit := bfloat16_unit()) and suits_bfloat16(model):
        return "bfloat16", f"this CPU's {unit} multiplies matrices faster in it"
    return "float32", "half precision is not known to be faster for this model on this CPU"


def autocast(device, precision):
    """A context in which layers compute in one of PRECISIONS, their weights being float32."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32")


def bfloat16_unit():
    """What the CPU multiplies matrices of bfloat16 with, AMX or AVX512_BF16; None without, or if torch cannot tell."""
    features = getattr(torch.cpu, "get_capabilities", dict)()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16"}
    return next((name for feature, name in names.items() if features.get(feature)), None)


def suits_bfloat16(model):
    """Whether a model's layers gain by a CPU that multiplies matrices of bfloat16.

    Models of ordinary convolutions were 1.6 to 3.7 times as fast with AMX, and 1.1 to 2.2 times with AVX512_BF16,
    those with depthwise ones or torch's own attention up to three times slower. (torchvision's Swin, which has neither,
    gained too.)
    """
    return not any(
        isinstance(layer, torch.nn.MultiheadAttention) or getattr(layer, "groups", 1) > 1 for layer in model.modules()
    )


COMPILE = ("always", "never")  # when to use torch.compile
# So many images through the network, forward and back, are worth compiling it: that takes about a minute, and saves
# some 240 us an image of the attack on a preresnet20 on a CPU with AMX, and on a GPU, by estimate, at least 30 us.
WORTH_COMPILING = 10**6


def pick_compile(name, faster, passes, begun=None):
    """Whether to use torch.compile, as one of COMPILE; name is one of them, or auto: as the work was begun, where it
    was, and else always where it makes this work faster, and images pass through the network often enough."""
    if name != "auto":
        return name
    return begun or ("always" if faster and passes >= WORTH_COMPILING else "never")


def describe_precision(precision, why, compile):
    """What a command says of pick_precision and pick_compile, as a line."""
    return f"in {precision} ({why})" + (", compiled" if compile == "always" else "")


# What models take


def check_size(model, images, where):
    """Raise UserError if a model does not take images [N, 3, H, W] of this size; where says what named the model."""
    try:
        with torch.no_grad():
            model.eval()(images)
    except (RuntimeError, AssertionError) as error:
        if memory_is_full(error):
            raise
        raise wrong_size(images, where, first_line(error)) from error


def wrong_size(images, where, why):
    """A UserError for a model that does not take images [N, 3, H, W] of this size."""
    size = f"{images.shape[3]}x{images.shape[2]}"
    return UserError(f"{where}: does not take images of {size} pixels ({why}); choose another, as preresnet20")


def check_last_batch(model, image, count, batch_size, where):
    """Raise UserError where an epoch of count images ends with one alone, and the model's batch norm cannot take it.

    image is any [1, C, H, W]; where says where the batch size was named.
    """
    if (count % batch_size or batch_size) > 1:
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(image)  # a copy: it changes running statistics
    except ValueError as error:
        raise UserError(
            f"{where} {batch_size}: leaves the last of {count} images a batch of its own, which is too little for the "
            "model's batch norm; choose another"
        ) from error


# Provenance


def environment(device):
    """What results depend on beside settings: the device, threads and versions."""
    cpu = ", ".join(filter(None, ["CPU", torch.backends.cpu.get_cpu_capability(), bfloat16_unit()]))
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **({"cudnn": torch.backends.cudnn.version()} if device.type == "cuda" else {}),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def commit():
    """The commit of this code, with -dirty where files differ from it, or None where it is not in a git repository."""
    folder = Path(__file__).parent
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
