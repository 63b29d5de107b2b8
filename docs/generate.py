"""Writes the pages that come from data: `models.md` from the catalogue, `settings.md` from the settings.

Run it after a change of either: `python docs/generate.py`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from fundament.catalog import CATALOG, EMBEDDED, Kind, ModelSpec
from fundament.cli import app
from fundament.config import Settings
from fundament.models import families

MADE = "<!-- Made by docs/generate.py: change the data there or in src, not this page. -->"

MODELS = f"""\
{MADE}

# Models

Every model that Fundament knows.

- Fundament ships no weights but those of `{EMBEDDED.id}`. Get a model's with `fundament pull ID`, or name a directory
  that holds them: `fundament serve --model ID=DIR`.
- Callers and commands may say a model's long name: `jinaai/jina-embeddings-v3` and `jina-ai/jina-embeddings-v3` mean
  `jina-embeddings-v3`. Capital letters do not matter.
- *Context* is the most tokens of one input, special tokens included.
- *Licence* is that of the weights. A licence with NC, or for research, forbids commercial use.
"""

HEADINGS: dict[Kind, tuple[str, str]] = {
    "embedding": (
        "Embedding models",
        "*Dimensions* is the length of a vector, then what a request may ask for with `dimensions`. *Tasks* are the "
        "values of `task`; the one in bold is used where a request names none.",
    ),
    "reranker": (
        "Rerankers",
        "They score documents against a query; [api.md](api.md#post-v1rerank) says what each *score* is. *Dimensions* "
        "is the length of the vectors that `return_embeddings` adds, where a model has them. The embedding models "
        "above rank too.",
    ),
    "chat": ("Chat models", "They answer in words."),
}

COLUMNS = ("Model", "Parameters", "Dimensions", "Context", "Reads", "Tasks", "Score", "Licence", "Served")

SETTINGS = f"""\
{MADE}

# Settings

A setting can be given in three places. The first one that names it wins:

1. a **flag** of `fundament serve`;
2. an **environment** variable: `FUNDAMENT_` and the setting's name in capital letters. A list is written with commas:
   `FUNDAMENT_MODELS=jina-embeddings-v3,jina-reranker-v3`;
3. the **file** `fundament.toml` in the working directory, or the file that `FUNDAMENT_CONFIG` names, which must
   be there:

   ```toml
   models = ["jina-embeddings-v3", "mine=/srv/models/mine"]
   port = 9000
   ```

The file knows every setting by its plain name. A name in it or in the environment that is no setting, or a value
that does not fit, stops the start with a sentence that says so. A setting without a flag (-) is for the environment or
the file. `FUNDAMENT_URL` and `FUNDAMENT_API_KEY` are no settings: they are where `fundament batch` finds its server.
"""


def models_page() -> str:
    """`models.md`: one table per kind, in the order of the catalogue."""
    parts = [MODELS]
    for kind, (heading, text) in HEADINGS.items():
        rows = [_model_row(spec) for spec in CATALOG.values() if spec.kind == kind]
        # A column that no model of the kind fills says nothing.
        kept = [i for i, _ in enumerate(COLUMNS) if any(row[i] != "-" for row in rows)]
        table = _table([COLUMNS[i] for i in kept], ([row[i] for i in kept] for row in rows))
        parts.append(f"## {heading}\n\n{text}\n\n{table}")
    return "\n".join(parts)


def _model_row(spec: ModelSpec) -> list[str]:
    also = f" (also `{'`, `'.join(spec.aliases)}`)" if spec.aliases else ""
    tasks = (f"**`{task}`**" if task == spec.default_task else f"`{task}`" for task in spec.tasks)
    return [
        f"`{spec.id}`{also}<br>{spec.description}",
        _count(spec.n_parameters),
        _dimensions(spec),
        f"{spec.context:,}",
        ", ".join(spec.modalities),
        ", ".join(tasks) or "-",
        spec.ranks_by or "-",
        spec.licence,
        "-" if spec.family in families() else "not yet",
    ]


def _count(n: int) -> str:
    """A number of parameters to three places: 22.7M, 3.93B."""
    return f"{n / 1e9:.3g}B" if n >= 999_500_000 else f"{n / 1e6:.3g}M"


def _dimensions(spec: ModelSpec) -> str:
    if not spec.dim:
        return "-"
    if spec.dims:
        return f"{spec.dim} ({', '.join(map(str, spec.dims))})"
    return f"{spec.dim} ({spec.shortest_dim} to {spec.dim})" if spec.shortest_dim else str(spec.dim)


def settings_page() -> str:
    """`settings.md`: one row per setting, in the order of the class."""
    flags = _flags()
    rows = (
        [
            f"`{name}`",
            flags.get(name, "-"),
            f"`FUNDAMENT_{name.upper()}`",
            _default(field),
            _meaning(field),
        ]
        for name, field in Settings.model_fields.items()
    )
    return f"{SETTINGS}\n{_table(('Setting', 'Flag', 'Environment', 'Default', 'Meaning'), rows)}"


def _flags() -> dict[str, str]:
    """The flags of `fundament serve` by the setting they give."""
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {
        param.name: " ".join(f"`{flag}`" for flag in (*param.opts, *param.secondary_opts))
        for param in serve.params
        if param.name in Settings.model_fields
    }


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return (field.default_factory.__doc__ or "").strip().rstrip(".")
    value: Any = field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "none" if value in (None, "", [], {}) else f"`{value}`"


def _meaning(field: FieldInfo) -> str:
    meaning = field.description or ""
    if get_origin(field.annotation) is Literal:
        values = ", ".join(f"`{value}`" for value in get_args(field.annotation))
        meaning = f"{meaning} One of {values}."
    return meaning


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


PAGES = {"models.md": models_page, "settings.md": settings_page}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (Path(__file__).parent / page).write_text(text(), encoding="utf-8")
