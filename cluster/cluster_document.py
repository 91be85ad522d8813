"""Text in YAML or JSON as plain values that know on which line each of them stands.

YAML is read as plain data: no tags of other types, and no aliases, with which a small file could unfold to any size.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Union

import yaml
from yaml.composer import ComposerError

__all__ = ["ClusterFileError", "Document", "Path", "read_document", "write_json", "write_yaml"]

Path = tuple[Union[str, int], ...]  # the field names and positions that lead to a value


class ClusterFileError(ValueError):
    """A cluster file that cannot be used; the text names file, line, field and value, and what would be right."""


class Document(NamedTuple):
    """What a text says.

    Attributes
    ----------
    name : str
        What messages call the text, usually the name of its file.
    content : dict, list, str, int, float, bool or None
        The values.
    lines : dict of tuple to int
        For each path the line on which its value begins, from 1 on; empty if they are not known.
    """

    name: str
    content: Any
    lines: dict[Path, int]

    def error(self, path: Path, problem: str) -> ClusterFileError:
        """Make the error about the value at `path`; the line is that of the nearest value that has one."""
        known = next((path[:end] for end in range(len(path), -1, -1) if path[:end] in self.lines), None)
        line = "" if known is None else f":{self.lines[known]}"
        where = _spelled(path)
        return ClusterFileError(f"{self.name}{line}: {where + ' ' if where else ''}{problem}")


def read_document(text: str, name: str) -> Document:
    """Read a text: JSON if it begins with a brace, else YAML.

    Raises
    ------
    ClusterFileError
        It is neither, a field stands twice in one object, or it is nested too deeply.
    """
    if text.lstrip().startswith("{"):
        return _read_json(text, name)
    return _read_yaml(text, name)


def write_json(content: Any) -> str:
    """Write plain values as JSON, on one line."""
    return json.dumps(content)


def write_yaml(content: Any) -> str:
    """Write plain values as YAML, fields in their order."""
    return str(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True))


def _spelled(path: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _read_json(text: str, name: str) -> Document:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            repeated = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            raise ClusterFileError(f"{name}: field {repeated!r} stands twice in one object")
        return content

    try:
        return Document(name, json.loads(text, object_pairs_hook=without_repeats), {})
    except json.JSONDecodeError as error:
        raise ClusterFileError(f"{name}:{error.lineno}: no JSON: {error.msg}, at column {error.colno}") from None
    except RecursionError:
        raise ClusterFileError(f"{name}: no cluster file: it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, "aliases are not supported", event.start_mark)
        return super().compose_node(parent, index)


def _read_yaml(text: str, name: str) -> Document:
    document = Document(name, None, {})
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return document._replace(content=None if node is None else _plain(loader, node, (), document))
        finally:
            loader.dispose()
    except ClusterFileError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise ClusterFileError(f"{name}{line}: no YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ClusterFileError(f"{name}: no cluster file: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, for instance
        raise ClusterFileError(f"{name}: no YAML: {' '.join(str(error).split())}") from None


def _plain(loader: yaml.SafeLoader, node: yaml.Node, path: Path, document: Document) -> Any:
    """Turn a node into plain values, and note the lines in `document`."""
    document.lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, index), document) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    content: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _plain(loader, key_node, (), Document(document.name, None, {}))
        if not isinstance(key, str) or key in content:
            document.lines[path] = key_node.start_mark.line + 1
            raise document.error(path, f"has the field {key!r}" + (" twice" if key in content else ", should be text"))
        content[key] = _plain(loader, value_node, (*path, key), document)
    return content
