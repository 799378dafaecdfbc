"""`ddpm export-diffusers`: run folder in, the folder of a diffusers pipeline out."""

from pathlib import Path
from typing import Annotated

import typer

from ddpm import runs
from ddpm.extras import need


def export_diffusers(
    run: Annotated[Path, typer.Argument(help="run folder")],
    folder: Annotated[Path, typer.Argument(help="folder to make")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the pipeline in FOLDER")] = False,
) -> None:
    """Write a run as a pipeline that diffusers loads; what is no network of diffusers needs `import ddpm.pipelines`."""
    need("diffusers")
    from ddpm import pipelines

    opened = runs.load_run(run)
    left = pipelines.write_pipeline(opened, folder, overwrite)
    for each in left:
        print(f"note: the pipeline does not know {each}")
    kept = opened.options()
    print(f"wrote {folder} ({kept['solver']}, {kept.get('steps') or opened.schedule.timesteps} steps)")
