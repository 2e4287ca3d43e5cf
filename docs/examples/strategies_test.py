"""A property of all trees: no range shows more of a region than there is."""

from hypothesis import given, settings

from memlistener import FlatView
from memlistener.testing.strategies import TreePlan, tree_plans


@settings(max_examples=50, deadline=None)
@given(tree_plans())
def test_no_range_is_longer_than_its_region(plan: TreePlan) -> None:
    """Whatever covers what: a range stays within the region that it shows."""
    root, *_ = plan.build()
    for each in FlatView.render(root):
        assert each.offset + each.size <= each.region.size


if __name__ == "__main__":
    test_no_range_is_longer_than_its_region()
    print("held for 50 trees")
