"""Which nodes of an ``info mtree`` text are one region, and what aliases show.

A region that an alias shows has a section of its own, and is printed again
wherever its container is. Both look the same to the last line below them,
which is how they are recognised: containers hold more lines than what is in
them, so going from the longest section to the shortest finds every container
before what it contains.

Sections of targets come in the order in which aliases mention them first. That
tells apart targets of one name, together with what an alias would show of each.
"""

from __future__ import annotations

from memlistener.core.mtree_lines import Guess
from memlistener.core.mtree_sections import Node, Section

_SAME_GUESS = "several regions look exactly like this one: which of them is shown is guessed"
_TARGET_GUESS = "several alias targets have this name: which of them is meant is guessed"


def link(sections: list[Section]) -> tuple[list[Node], list[Guess]]:
    """Unite what is printed twice, and give aliases their targets.

    Returns:
        The roots of trees that are in no other, and what had to be guessed.

    Raises:
        MtreeError: The target of an alias is not in the text.
    """
    numbers = _signatures(sections)
    roots, guesses = _unite(sections, numbers)
    nodes = [node for root in roots for node in root.walk()]
    canonical = set(nodes)
    guesses += _find_targets(sections, canonical)
    return roots, guesses


# ---- what is printed more than once ---------------------------------------------


def _signatures(sections: list[Section]) -> dict[Node, int]:
    """A number for each node; equal for those that look alike, children and all."""
    numbers: dict[Node, int] = {}
    known: dict[tuple[object, ...], int] = {}
    for section in sections:
        for node in reversed(list(section.root.walk())):  # children before parents
            looks = (
                (node.name, node.addr, node.size, node.kind, node.priority, node.nonvolatile),
                (node.disabled, node.target_name, node.offset),
                tuple(numbers[child] for child in node.children),
            )
            numbers[node] = known.setdefault(looks, len(known))
    return numbers


def _unite(sections: list[Section], numbers: dict[Node, int]) -> tuple[list[Node], list[Guess]]:
    """Make each section's root one with the node that shows the same region."""
    roots: list[Node] = []
    inner: dict[int, list[Node]] = {}  # nodes below those roots, by look
    spaces: dict[int, list[Node]] = {}  # roots of address spaces, by look
    unsure: list[int] = []
    for section in sorted(sections, key=lambda each: (-len(each.lines), not each.spaces)):
        root, number = section.root, numbers[section.root]
        found = inner.get(number, [])
        if not section.spaces:
            found = spaces.get(number, []) + found
        # Two targets, and two groups of address spaces, are never one region.
        found = [each for each in found if not _claimed(each, section)]
        if found:
            root.canonical = found[0].canonical
            if len(found) > 1:
                unsure.append(section.header.number)
        else:
            roots.append(root)
            for node in root.walk():
                if node is not root:
                    inner.setdefault(numbers[node], []).append(node)
        _claim(root.canonical, section)
        if section.spaces:
            spaces.setdefault(number, []).append(root.canonical)
    return roots, [Guess(_SAME_GUESS, tuple(unsure))] if unsure else []


def _claimed(node: Node, section: Section) -> bool:
    return node.canonical.is_space if section.spaces else node.canonical.is_target


def _claim(node: Node, section: Section) -> None:
    if section.spaces:
        node.is_space = True
    else:
        node.is_target = True


# ---- what aliases show ------------------------------------------------------------


def _find_targets(sections: list[Section], canonical: set[Node]) -> list[Guess]:
    """Give each alias its target."""
    chooser = _Chooser([section for section in sections if not section.spaces])
    unsure: list[int] = []
    for section in sections:
        for parent, node in _aliases(section.root):
            if chooser.choose(section, parent, node) and node in canonical:
                unsure.append(node.source.number)
    return [Guess(_TARGET_GUESS, tuple(unsure))] if unsure else []


def _aliases(root: Node) -> list[tuple[Node, Node]]:
    """The aliases below ``root`` with their parents, in the order printed."""
    found = [(root, root)] if root.target_name is not None else []
    for node in root.walk():
        found += [(node, child) for child in node.children if child.target_name is not None]
    return sorted(found, key=lambda pair: pair[1].source.number)


class _Chooser:
    """Finds what each alias shows; asked for all of them in the order printed."""

    def __init__(self, targets: list[Section]) -> None:
        self._targets = targets
        self._by_name: dict[str, list[int]] = {}
        for index, section in enumerate(targets):
            self._by_name.setdefault(section.name, []).append(index)
        self._index = {section: index for index, section in enumerate(targets)}
        self._met = 0  # so many targets have been mentioned
        self._shows: dict[int, set[int]] = {}  # target -> the targets of its aliases
        self._used: dict[tuple[Node, int], set[str]] = {}  # (parent, target) -> alias names

    def choose(self, section: Section, parent: Node, alias: Node) -> bool:
        """Set the target of ``alias``; whether there was a choice.

        Raises:
            MtreeError: The text has no section of that name.
        """
        assert alias.target_name is not None
        candidates = self._by_name.get(alias.target_name)
        if candidates is None:
            raise alias.source.error(
                f"an alias of a region with a section 'memory-region: {alias.target_name}'"
            )
        source = self._index.get(section)
        # Only the next target can be one that no alias has mentioned before.
        possible = [each for each in candidates if each <= self._met] or candidates
        chosen = possible[0]
        if len(possible) > 1:
            chosen = max(possible, key=lambda each: self._fitness(source, parent, alias, each))
        self._used.setdefault((parent, chosen), set()).add(alias.name)
        if source is not None:
            self._shows.setdefault(source, set()).add(chosen)
        self._met = max(self._met, chosen + 1)
        alias.target = self._targets[chosen].root
        return len(possible) > 1

    def _fitness(
        self, source: int | None, parent: Node, alias: Node, target: int
    ) -> tuple[int, ...]:
        """What speaks for a target, the weightiest first."""
        used = self._used.get((parent, target), set())
        return (
            not self._leads_to(target, source),
            *_shown(self._targets[target].root, alias),
            # A bridge has one window of each name, and all of them show one bus.
            alias.name not in used,
            bool(used),
            target == self._met,
            -target,
        )

    def _leads_to(self, target: int, source: int | None) -> bool:
        """Whether aliases lead from ``target`` back to the section ``source``."""
        seen: set[int] = set()
        todo = [target]
        while todo:
            each = todo.pop()
            if each == source:
                return True
            if each not in seen:
                seen.add(each)
                todo += self._shows.get(each, ())
        return False


def _shown(target: Node, alias: Node) -> tuple[bool, int]:
    """How well a target fits an alias: in kind, and in how much shows through."""
    end = alias.offset + alias.size
    shown = sum(
        not child.disabled and child.addr < end and alias.offset < child.addr + child.size
        for child in target.children
    )
    return target.target_name is not None or target.kind == alias.kind, shown
