"""Options that are settings, and the settings that they make."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError

from fundament.cli.output import refuse
from fundament.config import Settings, check_environment, check_file, config_file
from fundament.errors import near

# Options that several commands take. None means that neither the environment nor the file is overruled. A command that
# takes settings alone has a parameter for each, of the setting's name, and has them together from its context.
Models = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads this form on every supported version
    typer.Option("--model", metavar="ID[=DIR]", help="Serve this model; may be given several times."),
]
Aliases = Annotated[
    Optional[list[str]],  # noqa: UP045 - as above
    typer.Option("--alias", metavar="NAME=MODEL[:TASK]", help="Answer to NAME as MODEL; may be given several times."),
]
AllowTorchscript = Annotated[
    bool | None,
    typer.Option("--allow-torchscript", help="Serve TorchScript files, which run code when they are loaded."),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")]
Port = Annotated[int | None, typer.Option(help="Port to listen on.", show_default="8080")]
Auth = Annotated[bool | None, typer.Option("--auth/--no-auth", help="Ask for keys; needed beyond loopback.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1.", show_default="auto")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")]
DataDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where models and the store are kept.", show_default="in your home"),
]
Preload = Annotated[bool | None, typer.Option("--preload/--lazy", help="Load models at start.", show_default="preload")]
IdleSeconds = Annotated[float | None, typer.Option(help="Let a model go after this long unused.", show_default="never")]
LogFormat = Annotated[str | None, typer.Option(help="text or json.", show_default="text")]
MemoryGb = Annotated[
    float | None, typer.Option(help="Most memory of all models together.", show_default="80 % of what is free")
]

_NOT_GIVEN: tuple[Any, ...] = (None, (), [])
_WORDS = {
    "int_parsing": "write a whole number",
    "float_parsing": "write a number",
    "bool_parsing": "write true or false",
}


def settings_of(**given: Any) -> Settings:
    """The settings, those that are given over the environment's and the file's; None and an empty list give none."""
    try:
        check_environment()
        check_file()
        return Settings(**{name: value for name, value in given.items() if value not in _NOT_GIVEN})
    except SettingsError:  # the one setting that is no word or list of words
        refuse('FUNDAMENT_TIERS should be JSON, as in {"gold": {"requests_per_minute": 50}}')
    except ValidationError as error:
        refuse("; ".join(_told(fault, given) for fault in error.errors()))
    except ValueError as error:
        refuse(str(error))


def _told(fault: Any, given: Mapping[str, Any]) -> str:
    """What is wrong with a setting, and with the file where it is that which says it."""
    setting, name = str(fault["loc"][0]), ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        meant = near(setting, Settings.model_fields)
        return f"{config_file()}: '{name}' is not a setting; docs/settings.md lists them.{meant}"
    elsewhere = given.get(setting) not in _NOT_GIVEN or f"FUNDAMENT_{setting}".upper() in map(str.upper, os.environ)
    where = "" if elsewhere else f"{config_file()}: "
    return f"{where}{name}: {_WORDS.get(fault['type'], fault['msg'].removeprefix('Value error, '))}"
