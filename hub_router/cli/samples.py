"""``samples``: examples of an adapter's task, those found by ``sync`` and those that the user gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_router.cli.options import Call, common_options
from hub_router.cli.output import one_line
from hub_router.records import SAMPLE_SPLITS, SAMPLES_GIVEN, SAMPLES_LEAST, SAMPLES_PER_SPLIT

if TYPE_CHECKING:
    from hub_router.hub.samples import AddedSamples
    from hub_router.records import Sample

SHOWN = 3


@click.group()
def samples() -> None:
    """List, add and remove examples of an adapter's task.

    Search embeds those of the split "sample", eval scores those of the split "test". ADAPTER is as for show.
    """


@samples.command()
@click.argument("adapter")
@click.argument("file", required=False)
@click.option("--input-field", metavar="NAME", help="Field of FILE with the input. Default: input.")
@click.option(
    "--output-field", metavar="NAME", help="Field of FILE with the output. Default: output, which may be absent."
)
@click.option(
    "--dataset", metavar="NAME", help="OWNER/NAME on the Hub, a folder or a csv, tsv, json, jsonl or parquet file."
)
@click.option("--column", metavar="NAME", help="Column of the dataset with the inputs.")
@click.option("--output-column", metavar="NAME", help="Column of the dataset with the outputs.")
@click.option("--dataset-config", metavar="NAME", help="Configuration of the dataset, where it has several.")
@click.option("--dataset-split", metavar="NAME", help="The dataset's own split. Default: train.")
@click.option(
    "--split",
    type=click.Choice(SAMPLE_SPLITS),
    default="sample",
    show_default=True,
    help="sample: for routing and search; test: for evaluation.",
)
@click.option(
    "--limit",
    type=click.IntRange(SAMPLES_LEAST, SAMPLES_PER_SPLIT),
    default=SAMPLES_GIVEN,
    show_default=True,
    help="At most so many; of more, the same choice every time, spread over the whole source.",
)
@click.option("--replace", is_flag=True, help="Put them in place of those added from the same origin before.")
@common_options
def add(call: Call, adapter: str, file: str | None, split: str, limit: int, replace: bool, **names: str | None) -> None:
    """Add samples from FILE or from a dataset; sync never removes them.

    FILE holds one JSON object per line, {"input": text, "output": text}; where a line is none, nothing is added.
    --dataset reads all rows of one split of a dataset and needs the extra: pip install 'hub-router[datasets]'.
    """
    given = _arguments(file, names)
    with call.hub() as hub:
        if file is not None:
            done = hub.samples.add(adapter, Path(file), split=split, limit=limit, replace=replace, **given)
        else:
            done = hub.samples.add_dataset(adapter, split=split, limit=limit, replace=replace, **given)
    call.out.document(done)
    call.out.text(_told(done))
    if done.split == "sample" and done.added + done.replaced:
        call.out.remark("Next: hub-router index")


def _arguments(file: str | None, names: dict[str, str | None]) -> dict[str, Any]:
    """The options that belong to the kind of source, as the Python interface calls them."""
    of_file = {name: value for name, value in names.items() if name.endswith("_field") and value is not None}
    of_dataset = {name: value for name, value in names.items() if name not in of_file and value is not None}
    if (file is None) == ("dataset" not in of_dataset):
        raise click.UsageError("name either a FILE or a --dataset")
    foreign = of_dataset if file is not None else of_file
    if foreign:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise click.UsageError(f"{options} belongs to {'--dataset' if file is not None else 'a FILE'}")
    if file is not None:
        return of_file
    if "column" not in of_dataset:
        raise click.UsageError("--dataset needs a --column, the one with the inputs")
    renamed = {"dataset": "name", "dataset_config": "config"}
    return {renamed.get(name, name): value for name, value in of_dataset.items()}


def _told(done: AddedSamples) -> str:
    """What became of the samples, in words."""
    lines = [f"Added {done.added} samples to {done.adapter}, split {done.split!r}, origin {done.origin!r}."]
    if done.replaced:
        lines.append(f"They take the place of {done.replaced} of the same origin.")
    if done.known:
        lines.append(f"{done.known} were given before and are kept as they were.")
    if done.left_out:
        lines.append(f"{done.left_out} more were left out for --limit.")
    if done.unusable:
        lines.append(f"{done.unusable} rows give no sample, the first because {done.reason}.")
    return "\n".join(lines)


@samples.command("list")
@click.argument("adapter")
@common_options
def list_samples(call: Call, adapter: str) -> None:
    """List an adapter's samples by split and origin, with the first few of each."""
    with call.hub() as hub:
        found = hub.samples.list(adapter)
    groups: dict[tuple[str, str, bool], list[Sample]] = {}
    for sample in found:
        groups.setdefault((sample.split, sample.origin, sample.given), []).append(sample)
    call.out.document(
        {
            "origins": [
                {
                    "split": split,
                    "origin": origin,
                    "given": given,
                    "count": len(own),
                    "first": [{"input": sample.input, "output": sample.output} for sample in own[:SHOWN]],
                }
                for (split, origin, given), own in groups.items()
            ]
        }
    )
    if not found:
        call.out.remark("No samples; add some with: hub-router samples add ADAPTER FILE")
        return
    call.out.table(
        ["split", "origin", "given", "samples"],
        [[split, origin, "yes" if given else "no", len(own)] for (split, origin, given), own in groups.items()],
    )
    for (split, origin, _), own in groups.items():
        call.out.text(f"\n{split}, {origin}")
        for sample in own[:SHOWN]:
            call.out.text(f"  {one_line(sample.input, 80)} -> {one_line(sample.output, 40)}")


@samples.command()
@click.argument("adapter")
@click.option("--origin", required=True, metavar="ORIGIN", help="As samples list shows it, e.g. 'file mine.jsonl'.")
@common_options
def remove(call: Call, adapter: str, origin: str) -> None:
    """Remove samples that were added; those found by sync stay."""
    with call.hub() as hub:
        count = hub.samples.remove(adapter, origin)
    call.out.document({"removed": count, "origin": origin})
    call.out.text(f"Removed {count} samples of origin {origin!r}.")
    call.out.remark("Next: hub-router index")
