"""Read YAML in which no entry stands twice: YAML itself takes the last of them without a word."""

from __future__ import annotations

from typing import Any


def load_yaml(text: str) -> Any:
    """Return what YAML says, in plain types.

    Raises:
        yaml.YAMLError: it is none, or an entry stands twice in a mapping; with its line.

    >>> load_yaml("norm: {class_path: sn}")
    {'norm': {'class_path': 'sn'}}
    """
    # Imported late: only commands and plans need it.
    import yaml

    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    _check(root)
    return None if root is None else loader.construct_document(root)


def check_entries(text: str) -> None:
    """Refuse an entry that stands twice in one mapping.

    Raises:
        yaml.YAMLError: the entry, and its line.
    """
    import yaml

    # A word or a number, as most values of a command line are, has no entries.
    if ":" in text:
        _check(yaml.compose(text, Loader=yaml.SafeLoader))


def _check(root: Any) -> None:
    import yaml

    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))  # an alias is the same node again, maybe within itself
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        names: set[str] = set()
        for key, _ in pairs:
            name = key.value
            if isinstance(name, str) and name in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} stands there twice; leave one of the two", key.start_mark
                )
            names |= {name} if isinstance(name, str) else set()
        nodes += [value for _, value in pairs] if pairs else node.value
