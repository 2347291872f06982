"""The documentation is true: fields and defaults are those of the code, snippets run, links lead somewhere, YAML agrees with pydantic."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic_core import PydanticUndefined, to_jsonable_python

from d9d_lora.registry import BUILT_IN, resolve
from d9d_lora.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REQUIRED, UNSAID = "required", ""

# Where the YAML differs from the class on purpose: a preset for the command line, where one gives a path and starts.
DELIBERATE = {
    ("peft/lora", "target_modules"),
    ("peft/lora", "params.r"),
    ("peft/lora", "params.alpha"),
    ("peft/dora", "target_modules"),
    ("peft/dora", "params.r"),
    ("peft/dora", "params.alpha"),
    ("peft/full_tune", "module_name_pattern"),
    ("peft/vblora", "target_modules"),
    ("peft/vera", "target_modules"),
    ("peft/randlora", "target_modules"),
    ("peft/adalora", "target_modules"),
    ("peft/loha", "target_modules"),
    ("peft/lokr", "target_modules"),
}


def tables():
    """(page, config class, prefix, {field: (default as told, row)}) of every marked table."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for mark in re.finditer(r"<!-- fields of (\S+)\.(\w+) as (\S*)\. -->\n((?:\|.*\n)+)", text):
            config = getattr(importlib.import_module(mark[1]), mark[2])
            rows = {}
            for line in mark[4].splitlines()[2:]:
                name, default, *_ = [cell.strip() for cell in line.strip("|").split("|")]
                rows[name.strip("`")] = (default.strip("`"), line)
            yield page, config, f"{mark[3]}." if mark[3] else "", rows


def fields(config):
    return {field.alias or name: field for name, field in config.model_fields.items()}


def default_of(field):
    if field.is_required():
        return PydanticUndefined
    return to_jsonable_python(field.get_default(call_default_factory=True))


TABLES = list(tables())


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t[1].__name__)
def test_a_table_has_every_field_with_its_default(table):
    _, config, prefix, rows = table
    assert list(rows) == [prefix + name for name in sorted(fields(config), key=[r.removeprefix(prefix) for r in rows].index)]
    for name, field in fields(config).items():
        told, default = rows[prefix + name][0], default_of(field)
        if told == UNSAID:
            assert isinstance(default, dict), f"{name}: only a group may leave its default out"
        elif told == REQUIRED:
            assert default is PydanticUndefined, f"{name} has the default {default!r}"
        else:
            assert yaml.safe_load(told) == default, f"{name}: told {told}, is {default!r}"


def test_every_config_class_has_a_table():
    told = {config for _, config, _, _ in TABLES}
    run = {field.annotation for field in RunConfig.model_fields.values() if hasattr(field.annotation, "model_fields")}
    methods = {resolve(kind)[0] for kind in BUILT_IN}
    inner = {f.annotation for config in methods for f in config.model_fields.values() if hasattr(f.annotation, "model_fields")}
    missing = ({RunConfig} | {c for c in run if c.__name__ != "BaseModel"} | methods | inner) - told
    assert not missing, f"no table for {sorted(c.__name__ for c in missing)}"


# -- configs ------------------------------------------------------------------------------------------------------------------------


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_files():
    """(group/file, its content, the class it is validated by)."""
    groups = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    for file in sorted((ROOT / "configs").glob("*/*.yaml")):
        group = file.parent.name
        if group == "experiment":
            continue
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if group == "peft" and content == {"peft": None}:
            continue  # the method is that of model.adapter
        yield f"{group}/{file.stem}", content, resolve(content["kind"])[0] if group == "peft" else groups[group]


@pytest.mark.parametrize("name,content,config", [pytest.param(*c, id=c[0]) for c in config_files()])
def test_yaml_defaults_are_those_of_the_classes(name, content, config):
    for path, value in leaves(content):
        owner, *rest = path.split(".")
        field = fields(config).get(owner)
        assert field is not None, f"{name}: {path} is no field"
        for step in rest:
            field = fields(field.annotation)[step]
        default = default_of(field)
        if value == "???" or (config is resolve("stack")[0] and path == "methods"):
            continue  # to be given on the command line; an example
        if (name, path) not in DELIBERATE:
            assert _number(value) == default, f"{name}: {path} is {value!r}, the class says {default!r}"
            continue
        assert value != default, f"{name}: {path} is no difference any more"
        row = row_of(config, name.partition("/")[0], path)
        told = [yaml.safe_load(text) for text in re.findall(r"sets `([^`]*)`", row)]
        assert told == [value], f"{name} sets {path}: {value!r}; its table says {told}"


def row_of(config, group, path):
    """The row of a field, in the table of its class or of a class inside it."""
    inner = {config, *(f.annotation for f in config.model_fields.values() if hasattr(f.annotation, "model_fields"))}
    return next(rows[f"{group}.{path}"][1] for _, c, _, rows in TABLES if c in inner and f"{group}.{path}" in rows)


def _number(value):
    """YAML 1.1 takes 1e-3 for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def test_what_needs_a_plus_is_told_so():
    """A field that no YAML holds is set with a plus on the command line; its row says it, and no other row does."""
    held = {}
    for _, content, config in config_files():
        held.setdefault(config, set()).update(path for path, _ in leaves(content))
        held[config] |= {path.split(".")[0] for path, _ in leaves(content)}
    whole = yaml.safe_load((ROOT / "configs/train.yaml").read_text(encoding="utf-8"))
    held[RunConfig] = {*whole, *(next(iter(entry)) for entry in whole["defaults"] if isinstance(entry, dict))}
    for _, config, prefix, rows in TABLES:
        if config not in held:
            continue
        for path, (_, row) in rows.items():
            plus = path.removeprefix(prefix) not in held[config]
            assert (f"`+{path}=" in row) == plus, f"{path}: {'is in no YAML, and' if plus else 'is in the YAML, yet'} {row}"


# -- snippets and links -----------------------------------------------------------------------------------------------------------


def snippets():
    for page in PAGES:
        marked = r"<!-- runs( on (\d+) ranks)?( with d9d)? -->\n```python\n(.*?)```"
        for mark in re.finditer(marked, page.read_text(encoding="utf-8"), re.S):
            yield pytest.param(mark[4], int(mark[2] or 0), bool(mark[3]), id=f"{page.stem}:{mark[4].count(chr(10))} lines")


@pytest.mark.parametrize("code,ranks,d9d", snippets())
def test_snippets_run(code, ranks, d9d, tmp_path):
    if d9d and importlib.util.find_spec("d9d") is None:
        pytest.skip("d9d is not installed")
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *launcher, "snippet.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    if ranks:
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def prose(page):
    """A page without its blocks of code, whose brackets are no links."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if target.startswith("http"):
                continue
            path, _, part = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                broken.append(f"{page.name}: {target}")
            elif part and part not in [anchor(h) for h in re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)]:
                broken.append(f"{page.name}: {target} (no such heading)")
    assert not broken, broken


def test_paths_that_are_named_exist():
    """`state/names.py`, `tests/test_laws.py`, `launch/train.py`: in backticks, from the root or the package."""
    gone = []
    for page in PAGES:
        for path in re.findall(r"`((?:[\w.]+/)+[\w.]*\w\.(?:py|sh|sbatch|yaml|txt))`", page.read_text(encoding="utf-8")):
            if not any((base / path).exists() for base in (ROOT, ROOT / "d9d_lora", ROOT / "configs")):
                gone.append(f"{page.name}: {path}")
    assert not gone, gone


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\(([^)#\s]+)\)", (ROOT / "docs/index.md").read_text(encoding="utf-8")))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in PAGES if p.parent != ROOT}
    assert pages - {"index.md"} <= linked


def test_the_matrix_is_that_of_the_catalogue():
    """Its cells are written by the laws themselves (`tests/matrix.py`); no row or column may be missing from the page."""
    from tests.catalogue import LAYERS, LAYOUTS, METHODS

    page = (ROOT / "docs/matrix.md").read_text(encoding="utf-8")
    head, _, *rows = [line for line in page.splitlines() if line.startswith("|")]
    assert re.findall(r"`(\w+)`", head) == list(LAYERS)
    assert [re.match(r"\| `([^`]*)`", row)[1] for row in rows] == list(METHODS)
    assert all(f"`{layout}`" in page for layout in LAYOUTS)
    assert "| none |" not in page
