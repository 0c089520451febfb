"""The generated tables by the names that documents give them."""

from docs_build import attention, backends, grid, readme, study, suites

_OF_RESULTS = (
    grid.machine, grid.grid, grid.ratios, grid.portable, grid.everybody, grid.costs, suites.scaling, suites.varlen,
    suites.window, suites.gqa, suites.decode, suites.bias, suites.padding, suites.transformers,
    suites.distributed, suites.sink, suites.memory, suites.first_call, suites.host,
    suites.lengths, suites.cpu,
)  # fmt: skip

MAKERS = {
    "readme-speed": readme.speed,
    "backends": backends.takes,
    "orders": backends.orders,
    "hopper-rows": backends.rows_of_hopper,
    "attention": attention.findings,
    "study-means": study.means,
    "study-differences": study.differences,
    **{maker.__name__.replace("_", "-"): maker for maker in _OF_RESULTS},
}
