"""`python -m millrace.kernels.aot`: the table of docs/kernels.md, on standard output."""

from millrace.kernels.aot import SPECS, TARGETS, KernelSpec, compile_spec


def row(spec: KernelSpec) -> str:
    """registers / spills / shared KiB for each target; a dash where it is not built."""
    cells = []
    for name, target in TARGETS.items():
        if name not in spec.targets:
            cells.append("-")
            continue
        made = compile_spec(spec, target)
        cells.append(f"{made.registers} / {made.spills} / {made.shared / 1024:.1f}")
    return f"| {spec.name} | {spec.options['num_warps']} | " + " | ".join(cells) + " |"


def main() -> None:
    """One line a kernel, as they are compiled."""
    print("| kernel | warps | " + " | ".join(TARGETS) + " |")
    print("|---|---|" + "---|" * len(TARGETS))
    for spec in SPECS:
        print(row(spec), flush=True)


if __name__ == "__main__":
    main()
