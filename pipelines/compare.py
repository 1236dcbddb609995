"""The paper's Table 1 and Figure 9: SMS beside five other objectives, these with and without the style LoRA.

    python pipelines/compare.py out/compare [--manifest FILE] [--reference FILE_OR_FOLDER] [--set KEY=VALUE ...]

Each has the constants of its source, which `--set objective...` overrides; those whose source optimizes something else
than the latent of one picture (SDS, PDS, VSD) take steps and optimizer of the manifest's SMS. Runs, table and pictures
are as of `ablation.py`.
"""

import json

from ablation import options, show

import smsbatch as sb

OF_A_LATENT = ("dds", "cds")
SHARED = ("steps", "learning_rate", "warmup", "horizon")


def main() -> None:
    given = options(__doc__)
    sms = sb.load(given.manifest, given.set).objective
    shared = {name: getattr(sms, name) for name in SHARED}
    variants: dict[str, list[str]] = {}
    for name in ("sds", "dds", "pds", "cds", "vsd"):
        objective = {"name": name} if name in OF_A_LATENT else {"name": name, **shared}
        variants[name.upper()] = [f"objective={json.dumps(objective)}", "style.lora=[]"]
        variants[f"{name.upper()} + LoRA"] = variants[name.upper()][:1]
    show(variants | {"SMS": []}, given)


if __name__ == "__main__":
    main()
