"""The model card of an export: the facts of its run, its limits, and code that uses it.

The facts come from the run's ledger and the corpus's manifest. A fact that is in neither is left out. Folders are named
by their last part, because a card is made to be published.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi1.config import Phi1Config
from phi1.tokenizer import HUB_ID
from phi1.train.data.shards import read_manifest
from phi1.train.metrics.ledger import read_ledger
from phi1.train.recipe.recipe import Data, Model, Train

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- phi
- phi1
- code
- python
---

# {name}, step {step:,}

A causal language model of {parameters:,} parameters with phi-1's architecture, trained to complete Python code. The
facts below were written by the trainer, from the ledger of the run.

| fact | value |
|---|---|
{rows}

## Use

`"."` is the folder that holds this file. The model's name on the Hugging Face Hub can stand in its place.

```python
from transformers import pipeline

model = "."
complete = pipeline("text-generation", model=model)
print(complete("def area(self):", max_new_tokens=20)[0]["generated_text"])
```

```python
import phi1

model = "."
(text,) = phi1.generate(phi1.load(model), phi1.load_tokenizer(model), "def area(self):", max_new_tokens=20)
print("def area(self):" + text)
```

`sha256sum -c SHA256SUMS` compares the files with the hashes that were taken when they were written.

## Limits and safety

- The model continues Python text. It was not trained to follow instructions, to chat, or to refuse anything.
- Its code may be wrong, insecure or harmful, and may name packages that do not exist. Read it before you run it, and
  run it in a container. Do not let a program act on it unread.
- It may repeat parts of its training text word for word, names, secrets and mistakes included. The licences of that
  text may apply to what it repeats.
- It reflects the habits and prejudices of its training text, in identifiers, comments and strings too.
- It reads at most {context:,} tokens, and sees nothing before them. Text in other languages than Python, and prose, is
  outside its training.
- The results above are of one run and of its own held-out text. They say little about other code.

## Licence

{licence} No licence for the weights is stated here. Whoever publishes them adds it to the header, as `license:`.

## Recipe

```json
{settings}
```
"""


def model_card(run: Path, config: Phi1Config, step: int) -> str:
    """Return the text of README.md for the weights of a step.

    Args:
        run: the run's folder. If its ledger is missing or damaged, the card has no facts of the run.
        config: the model's.
        step: finished steps of the weights.
    """
    lines = _ledger(run / "ledger.jsonl")
    starts = [line["start"] for line in lines if "start" in line and line["start"].get("finished", 0) <= step]
    start = starts[-1] if starts else {}
    sections = _sections(start)
    made = _corpus(sections, start.get("data"))
    init = sections.get("model", {}).get("init")
    base = init if init and "/" in init and HUB_ID.fullmatch(init) and not Path(init).exists() else None
    rows = [*_training(sections, start, step), *_results(lines, step), *_provenance(made, start)]
    return _CARD.format(
        base=f"base_model: {base}\n" if base else "", name=sections.get("model", {}).get("preset", "phi"), step=step,
        parameters=config.num_parameters, context=config.max_position_embeddings, licence=_licence(made, start),
        rows="\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows),
        settings=json.dumps(_published(sections), indent=1))


def _ledger(path: Path) -> list[dict[str, Any]]:
    try:
        lines = read_ledger(path)
    except (OSError, ValueError, RecursionError):
        return []
    kinds = ("start", "eval", "humaneval")
    return [line for line in lines
            if isinstance(line, dict) and all(isinstance(line.get(kind, {}), dict) for kind in kinds)]


def _sections(start: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sections that decide the weights, with defaults for keys newer than the run; empty without a start."""
    given = start.get("config", {})
    return {name: asdict(section()) | given.get(name, {})
            for name, section in (("model", Model), ("data", Data), ("train", Train))} if given else {}


def _corpus(sections: dict[str, Any], fingerprint: str | None) -> dict[str, Any]:
    """Return the manifest of the corpus that the run was trained on; empty if it is not there any more."""
    try:
        manifest = read_manifest(Path(sections["data"]["folder"]))
    except (KeyError, ValueError, OSError):
        return {}
    return manifest if manifest["fingerprint"] == fingerprint else {}


def _training(sections: dict[str, Any], start: dict[str, Any], step: int) -> list[tuple[str, str]]:
    if not sections:
        return [("steps", f"{step:,}")]
    train, data, environment = sections["train"], sections["data"], start.get("environment", {})
    tokens = train["batch_size"] * data["seq_len"]
    rows = [("steps", f"{step:,} of {train['batch_size']:,} sequences of {data['seq_len']:,} tokens"),
            ("training tokens", f"{step * tokens:,}"),
            ("optimizer", f"AdamW, learning rate {train['lr']:g} at most, weight decay {train['weight_decay']:g}, "
                          f"dropout {train['dropout']:g}")]
    if sections["model"].get("init"):
        rows.append(("started from", f"`{_name(sections['model']['init'])}`"))
    if sections["model"]["lora_rank"]:
        rows.append(("trained weights", f"adapters of rank {sections['model']['lora_rank']}, merged into the weights"))
    if environment:
        rows.append(("trained on", f"{environment.get('world_size', 1)} x {environment.get('device')}, "
                                   f"{environment.get('precision')}"))
    return rows


def _results(lines: list[dict[str, Any]], step: int) -> list[tuple[str, str]]:
    rows = [("validation loss", f"{found['loss']:.4f} nats a token, {found['bits_per_byte']:.4f} bits a byte, on "
                                f"{found['n_bytes']:,} held-out bytes")
            for line in lines if (found := line.get("eval")) and found.get("step") == step
            and None not in map(found.get, ("loss", "bits_per_byte", "n_bytes"))]
    solved = [f"pass@1 {100 * found['pass@1']:.1f} % of {found['problems']:,} problems, greedy"
              for line in lines if (found := line.get("humaneval")) and found.get("step") == step]
    return [*(rows or [("validation loss", "not measured")]), ("HumanEval", solved[-1] if solved else "not run")]


def _provenance(manifest: dict[str, Any], start: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if manifest:
        splits, made = manifest["content"]["splits"], manifest["made"]
        rows.append(("corpus", ", ".join(f"`{_name(source)}`" for source in made.get("sources", []))))
        rows += [(f"{name} split", f"{split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} "
                                   "tokens") for name, split in splits.items()]
        if made.get("skipped"):
            rows.append(("left out", ", ".join(f"{count:,} {why}" for why, count in made["skipped"].items())))
        rows.append(("tokenizer, SHA-256", f"`{manifest['content']['tokenizer']}`"))
    if start.get("data"):
        rows.append(("corpus, SHA-256", f"`{start['data']}`"))
    if start.get("versions"):
        rows.append(("made with", ", ".join(f"{name} {text}" for name, text in start["versions"].items())
                     + f", commit {start.get('commit') or 'unknown'}"))
    return rows


def _licence(manifest: dict[str, Any], start: dict[str, Any]) -> str:
    if manifest and manifest["made"].get("sources") == ["stdlib"]:
        return f"The training text is the standard library of Python {start.get('versions', {}).get('python', '')}, " \
               "which is under the PSF License Agreement (PSF-2.0)."
    return "The licences of the training text are not recorded."


def _name(source: str) -> str:
    """Return a source's name without the folders above it."""
    return source if HUB_ID.fullmatch(source.split(":")[0]) else Path(source).name


def _published(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the sections without unset keys and without the paths of a machine."""
    kept = {name: {key: value for key, value in section.items() if value is not None}
            for name, section in sections.items()}
    for section, key in (("data", "folder"), ("data", "source"), ("data", "tokenizer"), ("model", "init")):
        if kept.get(section, {}).get(key):
            kept[section][key] = _name(kept[section][key])
    return kept
