"""What is written for people: pages that load nothing and escape all data, and pictures."""

from qlora_cli.report.plots import arena_plot, bar_of_elo, check_plot, error_plot, write_arena, write_plot
from qlora_cli.report.preview import MARK, preview_page, refuse_foreign, write_page
from qlora_cli.report.run import check_places, write_report

__all__ = [
    "MARK",
    "arena_plot",
    "bar_of_elo",
    "check_places",
    "check_plot",
    "error_plot",
    "preview_page",
    "refuse_foreign",
    "write_arena",
    "write_page",
    "write_plot",
    "write_report",
]
