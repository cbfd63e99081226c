"""How the page looks: one style sheet, for light and dark, for a desk and a phone. It loads nothing."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f6f2; --card: #ffffff; --text: #1d1f24; --soft: #646a75; --line: #e1dfd8;
  --sure: 38, 110, 206; --bad: #b3261e; --bad-soft: #fbe9e7; --good: #1d7a46; --good-soft: #e6f4ea;
  --warn: #8a5a00; --warn-soft: #fff3d6; --tip: #1d1f24; --tip-text: #f7f6f2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1d2026; --text: #e9e7e1; --soft: #9aa1ad; --line: #343943;
    --sure: 96, 165, 250; --bad: #ff8a80; --bad-soft: #3d1f1e; --good: #7bd8a0; --good-soft: #17342a;
    --warn: #ffcf70; --warn-soft: #3a2f16; --tip: #f0eee8; --tip-text: #1d1f24;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .35rem; }
p { margin: .35rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.1rem 1.2rem;
  margin-top: 1rem; }
.verdict { border-left: 8px solid var(--tone); background: var(--tone-soft); }
.verdict.bad { --tone: var(--bad); --tone-soft: var(--bad-soft); }
.verdict.good { --tone: var(--good); --tone-soft: var(--good-soft); }
.verdict.warn { --tone: var(--warn); --tone-soft: var(--warn-soft); }
.verdict strong { display: block; font-size: 1.9rem; line-height: 1.2; color: var(--tone); }
.gauges { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; margin-top: 1rem; }
.gauge .head { display: flex; justify-content: space-between; gap: .8rem; font-weight: 600; font-size: .92rem; }
.gauge .value { font-variant-numeric: tabular-nums; white-space: nowrap; }
.track { position: relative; height: 12px; border-radius: 6px; background: var(--line); margin: .35rem 0 .2rem; }
.fill { height: 100%; border-radius: 6px; background: rgb(var(--sure)); }
.fill.bad { background: var(--bad); }
.mark { position: absolute; top: -4px; bottom: -4px; width: 2px; background: var(--text); }
dl { display: grid; grid-template-columns: fit-content(15rem) 1fr; gap: .2rem 1rem; margin: .4rem 0 0;
  font-size: .95rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.prompt { color: var(--soft); font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer { font: 1.05rem/2.1 ui-monospace, monospace; margin: .15rem 0 .5rem; overflow-wrap: anywhere; }
.answer + .prompt, details + .prompt { margin-top: 1.1rem; border-top: 1px solid var(--line); padding-top: .8rem; }
.t { position: relative; display: inline-block; white-space: pre-wrap; border-radius: 4px; padding: 0 2px;
  margin: 0 1px; line-height: 1.5; min-width: .6em; background: rgba(var(--sure), calc(var(--p) * .55));
  cursor: help; }
.t.copy { box-shadow: inset 0 -3px 0 var(--bad); }
.t:focus { outline: 2px solid rgb(var(--sure)); }
.tip { display: none; position: absolute; z-index: 5; left: 0; top: 110%; min-width: 13rem; padding: .5rem .7rem;
  border-radius: 8px; background: var(--tip); color: var(--tip-text); font: .82rem/1.5 ui-monospace, monospace;
  box-shadow: 0 6px 20px rgba(0, 0, 0, .35); }
.t:hover .tip, .t:focus .tip { display: block; }
.tip span { display: flex; justify-content: space-between; gap: 1rem; white-space: pre-wrap; }
.tip span:first-child { font-weight: 700; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .85rem; color: var(--soft);
  margin: .3rem 0 1rem; }
.legend .t { cursor: default; }
summary { cursor: pointer; color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; padding: .2rem .5rem .2rem 0; white-space: nowrap; }
td { padding: .2rem .5rem .2rem 0; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; overflow-wrap: normal; }
.heat td { border: 2px solid var(--card); text-align: center; padding: .25rem .4rem; min-width: 4.2rem;
  background: rgba(var(--sure), var(--p)); }
.heat td.fault { background: var(--bad-soft); color: var(--bad); font-weight: 700; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.2rem, 1fr)); gap: .8rem; margin-top: .7rem; }
.maps figure { margin: 0; font-size: .78rem; color: var(--soft); line-height: 1.3; }
.maps svg { width: 100%; aspect-ratio: 1; background: var(--page); border: 1px solid var(--line); border-radius: 6px; }
.maps path { fill: rgb(var(--sure)); }
svg.chart { width: 100%; height: auto; max-height: 15rem; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .bar { fill: rgb(var(--sure)); } svg .line { fill: none; stroke: rgb(var(--sure)); stroke-width: 2.5; }
svg .axis { stroke: var(--line); } svg .even { stroke: var(--bad); stroke-dasharray: 5 4; }
code { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.fault-list { color: var(--bad); margin: .4rem 0; padding-left: 1.2rem; }
footer { color: var(--soft); font-size: .85rem; margin-top: 1.5rem; }
@media (max-width: 40rem) {
  main { padding: .8rem .6rem 3rem; } section { padding: .9rem .8rem; border-radius: 10px; }
  .verdict strong { font-size: 1.5rem; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; }
  .maps { grid-template-columns: repeat(auto-fill, minmax(5.4rem, 1fr)); gap: .5rem; }
  .tip { position: fixed; left: .6rem; right: .6rem; top: auto; bottom: .6rem; }
}
"""
