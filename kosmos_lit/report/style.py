"""The style sheet of report pages: light and dark, for screens of any width and for print."""

STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf8; --card: #ffffff; --ink: #1c1c1e; --soft: #5d5d63; --line: #e2dfd8;
  --ours: #0a558c; --tint: #eaf2f9; --good: #23703f; --bad: #a8322a; --bar: #b9cbdb; --warn: #fbf1d9; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181a; --card: #1e2023; --ink: #e9e7e2; --soft: #a3a3a8;
  --line: #34363a; --ours: #82bdf0; --tint: #1d2c3a; --good: #7cc796; --bad: #ef9087; --bar: #3d5468; --warn: #3a311a;
  } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 74rem; padding: 2.2rem 1.4rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 "Inter", "Helvetica Neue", "Segoe UI", Roboto, Arial, sans-serif; }
h1, h2 { font-family: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif; line-height: 1.2;
  font-weight: 600; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 0 0 .15rem; }
h3 { font-size: .8rem; font-weight: 600; margin: 1.5rem 0 .5rem; color: var(--soft); letter-spacing: .02em; }
a { color: inherit; text-decoration-color: var(--bar); text-underline-offset: .2em; }
a:hover { text-decoration-color: currentColor; }
p { margin: .3rem 0; max-width: 48rem; }
.soft, .notes, .source { color: var(--soft); font-size: .85rem; }
.notes { margin: .5rem 0 0; padding-left: 1.1rem; max-width: 56rem; }
.facts { display: flex; flex-wrap: wrap; gap: .15rem 1.6rem; margin: .6rem 0 1.4rem; font-size: .85rem; }
.facts div { display: flex; gap: .45rem; } .facts dt { color: var(--soft); } .facts dd { margin: 0;
  overflow-wrap: anywhere; }
.banner { background: var(--warn); padding: .5rem .8rem; border-radius: .3rem; max-width: none; }
section { margin-top: 2.6rem; padding-top: 1.3rem; border-top: 1px solid var(--line); }
.scroll { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; line-height: 1.3; }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: .4rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: 400;
  vertical-align: baseline; }
thead th { color: var(--soft); font-size: .8rem; border-bottom: 1px solid var(--soft); white-space: nowrap;
  vertical-align: bottom; }
thead th[colspan] { text-align: center; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: .4rem; position: sticky; left: 0; background: var(--paper);
  min-width: 7rem; }
td.text, th.text { text-align: left; }
td small, th small { display: block; color: var(--soft); font-size: .74rem; white-space: nowrap; }
th small { white-space: normal; }
tr.ours th, tr.ours td { background: var(--tint); }
tr.ours th, tr.ours b, b.ours { color: var(--ours); font-weight: 650; }
tr.chance th, tr.chance td { color: var(--soft); font-style: italic; }
td.good, .good { color: var(--good); } td.bad, .bad { color: var(--bad); }
.plot { display: block; width: 11rem; height: 1.1rem; }
.plot .track { stroke: var(--line); } .plot .chance { stroke: var(--soft); stroke-dasharray: 2 2; }
.plot .whisker { stroke: var(--ours); stroke-width: 3; stroke-opacity: .38; } .plot .value { fill: var(--ours); }
.plot .paper { fill: none; stroke: var(--ink); }
.key { display: inline-flex; align-items: center; gap: .35rem; margin-right: 1.1rem; white-space: nowrap; }
thead tr + tr th:first-child { text-align: right; position: static; min-width: 0; }
td:has(.plot) { vertical-align: middle; }
.key .plot { width: 3rem; height: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .9rem;
  align-items: start; }
article { background: var(--card); border: 1px solid var(--line); border-top: 3px solid var(--good);
  border-radius: .25rem;
  padding: .6rem .8rem .75rem; font-size: .87rem; break-inside: avoid; overflow-wrap: anywhere; min-width: 0; }
article.failure { border-top-color: var(--bad); }
article header { display: flex; justify-content: space-between; gap: .8rem; color: var(--soft); font-size: .76rem;
  margin-bottom: .4rem; }
.prompt { white-space: pre-wrap; margin: .25rem 0; line-height: 1.42; }
.prompt img, .prompt .missing { vertical-align: middle; margin: .15rem .25rem .15rem 0; }
img { max-width: 100%; height: auto; border-radius: .15rem; background: #fff; }
.missing { display: inline-block; border: 1px dashed var(--soft); border-radius: .2rem; color: var(--soft);
  padding: .4rem .6rem;
  font-size: .76rem; white-space: normal; }
.step { border-top: 1px solid var(--line); margin-top: .45rem; padding-top: .35rem; }
.written { color: var(--ours); white-space: pre-wrap; }
.answers { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .5rem 0 0;
  padding-top: .45rem;
  border-top: 1px solid var(--line); }
.answers dt { color: var(--soft); } .answers dd { margin: 0; min-width: 0; white-space: pre-wrap; }
.failure .prediction { color: var(--bad); } .success .prediction { color: var(--good); } .prediction { font-weight: 600; }
.shares { list-style: none; margin: .5rem 0 0; padding: 0; font-size: .8rem; font-variant-numeric: tabular-nums; }
.shares li { display: grid; grid-template-columns: minmax(0, 1fr) 6rem 2.6rem; gap: .5rem; align-items: center;
  text-align: right; }
.shares span:first-child { text-align: left; }
.shares i { display: block; height: .5rem; background: var(--bar); border-radius: .1rem; }
details { margin: .2rem 0; } details summary { margin-top: .9rem; }
summary { cursor: pointer; color: var(--soft); font-size: .8rem; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); }
@media (max-width: 40rem) { body { padding: 1.2rem .9rem 3rem; font-size: 14px; } th, td { padding: .3rem .5rem; }
  .plot { width: 7rem; } th:first-child { max-width: 9rem; } }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --ours: #0a4a7a;
  --tint: #eef3f8;
  --good: #1d5c34; --bad: #8c2a23; --bar: #b9cbdb; } body { max-width: none; padding: 0; font-size: 9.5pt; }
  section { margin-top: 1.4rem; padding-top: .8rem; } .scroll { overflow: visible; } th:first-child { position: static; }
  h2, h3, thead { break-after: avoid; } tr { break-inside: avoid; }
  tr, article, i { -webkit-print-color-adjust: exact; print-color-adjust: exact; } @page { margin: 1.6cm; } }
"""
