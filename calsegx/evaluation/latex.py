"""The overview as LaTeX (booktabs, graphicx): one table per domain and gap, with the legend below each."""

from collections.abc import Sequence

from calsegx.evaluation import methods, tables

_ESCAPES = {c: "\\" + c for c in "#$%&_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
}


def latex(
    blocks: Sequence[tables.Block],
    columns: Sequence[tables.Column] = tables.COLUMNS,
    legend: Sequence[str] = (),
) -> str:
    r"""The overview of these columns as ``table`` environments, to be included with ``\input``.

    Best values are bold and second ones underlined; below each number are its interval and how many values are
    undefined, below the table the legend and the definitions of the columns.
    """
    notes = [*map(escape, legend), *(f"{escape(c.title)}: {escape(c.definition)}." for c in columns)]
    head = " & ".join(["Method", *(_stacked(*_split(c.title)) for c in columns)])
    lines = [r"% \usepackage{booktabs,graphicx}"]
    for block in blocks:
        body = [
            " & ".join([escape(methods.display(name)), *(_cell(cell) for cell in cells)]) + r" \\"
            for name, cells in block.rows
        ]
        lines += [
            r"\begin{table}",
            rf"\caption{{{escape(block.title)}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *(body or [rf"\multicolumn{{{len(columns) + 1}}}{{l}}{{No results.}} \\"]),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\par\smallskip\footnotesize",
            *(note + r"\par" for note in notes),
            r"\end{table}",
            "",
        ]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text as LaTeX prints it literally."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def _split(title: str) -> tuple[str, ...]:
    """``HD95[max_directed,empty=diagonal] (mm)`` as two lines: a column is no wider than its numbers need."""
    name, bracket, rest = title.partition("[")
    return (name.strip(), bracket + rest) if bracket else (name,)


def _cell(cell: tables.Cell) -> str:
    text = escape(cell.text)
    if cell.best:
        text = rf"\textbf{{{text}}}"
    elif cell.second:
        text = rf"\underline{{{text}}}"
    stars = rf"\textsuperscript{{{cell.stars}}}" if cell.stars else ""
    below = [rf"\scriptsize {escape(line)}" for line in (cell.interval, cell.note) if line]
    return _stacked(text + stars, *below, escaped=True) if below else text + stars


def _stacked(*lines: str, escaped: bool = False) -> str:
    # Braces keep a line that starts with [ from being read as the option of the line break before it.
    shown = r" \\ ".join("{" + (line if escaped else escape(line)) + "}" for line in lines)
    return rf"\shortstack[r]{{{shown}}}"
