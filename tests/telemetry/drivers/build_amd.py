"""Build the simulated libamd_smi.so that fits the installed binding: every symbol it binds, with its own structures.

The structures differ from release to release. They are read from the binding, which imports only with a library: so
one of stubs is built first, and asked for in a process of its own.
"""

import ctypes
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

HERE = Path(__file__).parent
STRUCTURES = (
    *("power_info", "power_cap_info", "engine_usage", "vram_usage", "clk_info", "error_count", "gpu_metrics"),
    *("proc_info", "asic_info", "board_info", "driver_info", "vbios_info", "kfd_info", "enumeration_info"),
)
NOT_SUPPORTED = 2


def binding_folder() -> Path:
    """Return the folder `amdsmi` of the installed binding."""
    return Path(str(distribution("amdsmi").locate_file("amdsmi")))


def build(folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    """Build <folder>/lib/libamd_smi.so and return the folder, for ROCM_PATH.

    Args:
        folder: Where to build.
        without: Symbols to leave out, as a library has that is older than the binding.
    """
    library = folder / "lib" / "libamd_smi.so"
    library.parent.mkdir(parents=True)
    wrapper = (binding_folder() / "amdsmi_wrapper.py").read_text()
    names = sorted(set(re.findall(r"_libraries\['libamd_smi\.so'\]\.(\w+)", wrapper)) - set(without))
    stub = "__attribute__((weak)) int {}(void) {{ return " + str(NOT_SUPPORTED) + "; }}\n"
    stubs = folder / "stubs.c"
    stubs.write_text("".join(stub.format(name) for name in names))
    _compile(library, stubs)
    if without:
        return folder
    declared = subprocess.run(
        [sys.executable, str(HERE / "build_amd.py")],
        env={**os.environ, "ROCM_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "amd_smi_types.h").write_text(declared.stdout)
    library.unlink()  # never written over: a process may have it loaded
    _compile(library, stubs, HERE / "amd_smi.c")
    return folder


def _compile(library: Path, *sources: Path) -> None:
    # No soname: the loader would give this library to whoever asks for libamd_smi.so later in the same process.
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-Wno-unused-function",
        "-I",
        str(library.parent.parent),
    ]
    subprocess.run([*command, "-o", str(library), *map(str, sources), "-lm"], check=True)


def _declaration(kind: type, name: str) -> str:
    """Return a member or a type in C, as ctypes lays it out."""
    if issubclass(kind, ctypes.Array):
        return _declaration(kind._type_, f"{name}[{kind._length_}]")
    if issubclass(kind, ctypes.Structure | ctypes.Union):
        word = "union" if issubclass(kind, ctypes.Union) else "struct"
        return f"{word} {{ {' '.join(_declaration(part, part_name) for part_name, part in kind._fields_)} }} {name};"
    if issubclass(kind, ctypes._SimpleCData):
        size, code = ctypes.sizeof(kind), kind._type_
        word = "char" if code == "c" else {"f": "float", "d": "double"}.get(code)
        sign = "int" if code.islower() else "uint"
        return f"{word or f'{sign}{8 * size}_t'} {name};"
    return f"void *{name};"


def main() -> None:
    """Print the structures of the binding that imports here."""
    from amdsmi import amdsmi_interface

    print("#include <stdint.h>\n#pragma pack(push, 1)")
    for name in STRUCTURES:
        kind = getattr(amdsmi_interface.amdsmi_wrapper, f"amdsmi_{name}_t")
        print(f"typedef {_declaration(kind, f'amdsmi_{name}_t')}")
        print(f'_Static_assert(sizeof(amdsmi_{name}_t) == {ctypes.sizeof(kind)}, "{name}");')
    print("#pragma pack(pop)")


if __name__ == "__main__":
    main()
