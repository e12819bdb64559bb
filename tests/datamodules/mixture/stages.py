"""Stages of weights, as hypothesis draws them."""

from hypothesis import strategies as st

from datamodules.mixture import SourceMixtureStage, Stage

KIND_OF = (1, 0, 1, 0, 1, 2)
"""The kinds of the sources of `source_mixture_stages`."""


@st.composite
def mixture_stages(draw: st.DrawFn) -> list[Stage]:
    """1 to 4 stages over 1 to 5 options, each some rows to several periods long."""
    n_options, stages, first = draw(st.integers(1, 5)), [], 0
    for _ in range(draw(st.integers(1, 4))):
        weights = draw(st.lists(st.integers(0, 17), min_size=n_options, max_size=n_options).filter(any))
        stages.append(Stage(first, tuple(weights)))
        first += draw(st.integers(1, 5 * sum(weights)))
    return stages


@st.composite
def source_mixture_stages(draw: st.DrawFn) -> list[SourceMixtureStage]:
    """1 to 3 stages over three kinds, with two, three and one sources."""
    stages, first = [], 0
    for _ in range(draw(st.integers(1, 3))):
        ratio = draw(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any))
        weights = draw(st.lists(st.integers(0, 7), min_size=6, max_size=6))
        for kind, source in enumerate((1, 0, 5)):
            if ratio[kind] and not any(w for w, k in zip(weights, KIND_OF, strict=True) if k == kind):
                weights[source] = 1
        stages.append(SourceMixtureStage(first, tuple(ratio), tuple(weights)))
        first += draw(st.integers(1, 90))
    return stages
