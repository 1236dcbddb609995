"""`README.md` of a run: the card of its dataset, so that the folder explains itself when it is passed on.

The card is a pure function of the report. smsbatch cannot know the licence, so the card asks the user to state it.
"""

from __future__ import annotations

from smsbatch.report.model import Report
from smsbatch.text import render_template


def card(report: Report) -> str:
    last = report.shards - 1
    return render_template(
        "report/card.md.jinja",
        report=report,
        work=report.description,
        format=report.settings["output"]["format"],
        shards="shards/000000.tar" if last == 0 else f"shards/{{000000..{last:06d}}}.tar",
    )
