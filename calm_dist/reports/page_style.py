"""Style and script of the report page, which loads no other files."""

from calm_dist.reports.plots import DARK, LIGHT, Palette


def _variables(palette: Palette) -> str:
    series = " ".join(f"--series-{i}: {color};" for i, color in enumerate(palette.series, 1))
    return (
        f"--paper: {palette.paper}; --ink: {palette.ink}; --muted: {palette.muted}; "
        f"--line: {palette.line}; {series}"
    )


CSS = (
    f"""
:root {{ color-scheme: light dark; --panel: #f1f3f1; --focus: #2367c9; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --panel: #1e2226; --focus: #74a9f5; {_variables(DARK)} }}
}}
"""
    """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; letter-spacing: -.01em; }
p { max-width: 46rem; margin: .5rem 0; }
.lead { font-size: 1.1rem; }
.muted, figcaption, footer { color: var(--muted); font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr));
  gap: .75rem; margin: 1.5rem 0; padding: 0; }
.facts div { background: var(--panel); border-radius: .5rem; padding: .9rem 1rem;
  display: flex; flex-direction: column; justify-content: space-between; }
.facts dt { color: var(--muted); font-size: .9rem; }
.facts dd { margin: 0; font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts dd small { font-size: .9rem; font-weight: 400; color: var(--muted); white-space: nowrap; }
.facts dd .line { display: block; }
.notes { border-left: 3px solid var(--series-2); padding: .1rem 1rem; margin: 1.5rem 0; }
.notes ul { margin: .4rem 0; padding-left: 1.1rem; max-width: 46rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1rem 2rem; align-items: start; margin-top: 1rem; }
.plots.one { max-width: 35rem; }
figure { margin: 0; }
figcaption { font-weight: 600; color: var(--ink); margin-bottom: .25rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--muted); font-size: .9rem; width: fit-content; }
/* A shadow where more is to be scrolled to. */
.scroll { overflow-x: auto; margin: .75rem 0; background:
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
td.words { text-align: left; }
thead th { vertical-align: bottom; padding: 0; }
tbody th { font-weight: 400; white-space: normal; min-width: 6.5rem; max-width: 15rem; }
/* Above the other columns' buttons, which scroll beneath it. */
tr > :first-child { text-align: left; position: sticky; left: 0; z-index: 1;
  background: var(--paper); }
td:first-child, tbody th { padding-left: 0; }
thead button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0;
  padding: .4rem 1.1rem .4rem .6rem; width: 100%; text-align: inherit; cursor: pointer;
  white-space: normal; line-height: 1.3; position: relative; }
th, td { padding-right: 1.1rem; }
thead tr > :first-child button { padding-left: 0; }
thead th.words { text-align: left; }
thead button::after { content: "\\2195"; position: absolute; right: .25rem; bottom: .4rem;
  color: var(--muted); font-weight: 400; font-size: .85em; }
thead .words button::after, thead tr > :first-child button::after { position: static;
  margin-left: .35em; }
th[aria-sort="ascending"] button::after { content: "\\2191"; color: var(--ink); }
th[aria-sort="descending"] button::after { content: "\\2193"; color: var(--ink); }
:focus-visible { outline: 2px solid var(--focus); outline-offset: -2px; border-radius: .2rem; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
a { color: var(--series-1); }
code { font-size: .9em; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.6rem; }
  tbody th { max-width: 8rem; overflow-wrap: anywhere; } }
@media print { thead button::after { content: ""; } }
"""
)

# Numbers are compared as numbers, words as words; what is not known is last either way.
SCRIPT = """
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.value;
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const numbers = Number(x) - Number(y);
      const rising = Number.isNaN(numbers) ? x.localeCompare(y) : numbers;
      return up ? rising : -rising;
    };
    body.append(...[...body.rows].sort(order));
  });
}
"""
