// Draws the plan in #data with uPlot. Text of the plan goes into the page as text, never as markup.
"use strict";
(() => {
  const plan = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  const charts = [];

  const make = (name, attributes, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  };
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const number = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const percent = (share, digits = 1) => number(100 * share, digits) + "%";
  const time = (s) => (s >= 1 ? Number(s.toPrecision(3)) + " s" : Number((s * 1e3).toPrecision(3)) + " ms");
  const ratio = (division) => division.prefill + ":" + division.decode;

  const card = (title, note, wide) => {
    const body = make("section", { class: wide ? "card wide" : "card" }, make("h2", {}, title));
    if (note) body.append(make("p", { class: "note" }, note));
    return body;
  };
  const table = (heads, rows) => {
    const row = (cells, kind, attributes) =>
      make("tr", attributes || {}, ...cells.map((cell, i) => make(kind, heads[i].startsWith(">") ? { class: "n" } : {}, String(cell))));
    const body = make("tbody", {}, ...rows.map((cells) => row(cells.cells || cells, "td", cells.class ? { class: cells.class } : {})));
    return make("table", {}, make("thead", {}, row(heads.map((head) => head.replace(">", "")), "th")), body);
  };

  // Charts are drawn anew when the page's width or its colours change.
  const chart = (parent, options, data) => {
    const box = make("div", { class: "chart" });
    parent.append(box);
    let drawn = null;
    const draw = () => {
      if (drawn) drawn.destroy();
      drawn = new uPlot({ width: box.clientWidth || 500, height: 270, ...options() }, data, box);
    };
    charts.push(draw);
  };
  const redraw = () => charts.forEach((draw) => draw());
  const axis = (more) => ({ stroke: color("soft"), grid: { stroke: color("grid"), width: 1 }, ticks: { stroke: color("grid") }, ...more });
  const line = (u, x0, y0, x1, y1, stroke) => {
    const ctx = u.ctx;
    ctx.save();
    ctx.strokeStyle = stroke;
    ctx.lineWidth = devicePixelRatio * 1.5;
    ctx.setLineDash([6 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(x0, y0);
    ctx.lineTo(x1, y1);
    ctx.stroke();
    ctx.restore();
  };
  const label = (u, text, x, y, fill, align) => {
    const ctx = u.ctx;
    ctx.save();
    ctx.fillStyle = fill;
    ctx.font = 12 * devicePixelRatio + "px system-ui, sans-serif";
    ctx.textAlign = align || "left";
    ctx.fillText(text, x, y);
    ctx.restore();
  };

  const tiles = () => {
    const box = make("div", { class: "tiles" });
    const tile = (value, what) => box.append(make("div", { class: "tile" }, make("b", {}, value), make("span", {}, what)));
    const good = plan.goodput_rps;
    const between = good.low === null ? "too few requests for an interval" : `95%: ${number(good.low, 2)} to ${number(good.high, 2)}`;
    tile(number(good.mid, 2) + " req/s", `within the SLO, of ${number(plan.offered_rps, 2)} that come (${between})`);
    if (plan.cost_per_hour !== null) {
      tile(number(plan.cost_per_hour, 2), "cost per hour of all nodes");
      tile(number(plan.cost_per_mtok, 3), "cost per million tokens of answers within the SLO");
    }
    for (const clause of plan.question.slo) {
      tile(percent(plan.attainment[clause.text], 2), `of ${clause.metric === "itl" ? "gaps" : "requests"} keep ${clause.metric} ≤ ${time(clause.bound_s)}; promised ${percent(clause.share)}`);
    }
    const known = plan.regret.filter((shift) => shift.regret !== undefined);
    if (known.length) tile(percent(Math.max(...known.map((shift) => shift.regret)), 0), "largest regret if the mix shifts");
    return box;
  };

  const divisions = () => {
    const all = plan.divisions;
    const body = card("Goodput against the P:D ratio", "Every division of the same nodes under the same requests. Grey divisions break the SLO: the cliff. Lines are the shares within each bound, on the right.", true);
    const bars = (keep) => all.map((one) => (keep(one) && one.goodput_rps !== null ? one.goodput_rps : null));
    const data = [
      all.map((_, i) => i),
      bars((one) => one.chosen),
      bars((one) => one.meets && !one.chosen),
      bars((one) => !one.meets && !one.chosen),
      ...plan.question.slo.map((_, i) => all.map((one) => (one.attainment.length ? 100 * one.attainment[i] : null))),
    ];
    const paths = uPlot.paths.bars({ size: [0.72, 64] });
    const lines = ["warn", "second", "third", "ink"];
    chart(body, () => ({
      height: 330,
      scales: { x: { time: false, range: [-0.6, all.length - 0.4] }, y: { range: (u, low, high) => [0, high * 1.08 || 1] }, share: { range: [0, 104] } },
      axes: [
        axis({ splits: () => all.map((_, i) => i), incrs: [1], space: 46, values: (u, at) => at.map((i) => (all[i] ? (plan.nodes.length > 1 ? i + 1 : ratio(all[i])) : "")), grid: { show: false }, filter: (u, at) => at.map((i) => (all.length <= 24 || i % Math.ceil(all.length / 24) === 0 || (all[i] && all[i].chosen) ? i : null)), label: plan.nodes.length > 1 ? "division, numbered as in the table of verdicts" : "prefill : decode nodes", labelSize: 22, stroke: color("soft") }),
        axis({ label: "requests/s within the SLO", labelSize: 22 }),
        axis({ scale: "share", side: 1, values: (u, at) => at.map((v) => v + "%"), grid: { show: false } }),
      ],
      series: [
        { label: "division", value: (u, i) => (i === null || !all[i] ? "–" : all[i].name) },
        { label: "chosen", stroke: color("best"), fill: color("best"), paths, points: { show: false }, value: (u, v) => (v === null ? "–" : number(v, 2) + "/s") },
        { label: "keeps the SLO", stroke: color("good"), fill: color("good"), paths, points: { show: false }, value: (u, v) => (v === null ? "–" : number(v, 2) + "/s") },
        { label: "breaks it", stroke: color("bad"), fill: color("bad"), paths, points: { show: false }, value: (u, v) => (v === null ? "–" : number(v, 2) + "/s") },
        ...plan.question.slo.map((clause, i) => ({ label: clause.metric + " within", scale: "share", stroke: color(lines[i]), width: 2, points: { show: all.length < 40, size: 6, fill: color(lines[i]) }, value: (u, v) => (v === null ? "–" : number(v, 1) + "%") })),
      ],
      hooks: {
        draw: [(u) => plan.question.slo.forEach((clause, i) => {
          const y = u.valToPos(100 * clause.share, "share", true);
          line(u, u.bbox.left, y, u.bbox.left + u.bbox.width, y, color(lines[i]));
        })],
      },
    }), data);
    return body;
  };

  const distribution = (metric, title, note) => {
    const points = plan.distributions[metric].filter(([s]) => s > 0);
    const body = card(title, note);
    if (!points.length) {
      body.append(make("p", { class: "soft" }, "There are none."));
      return body;
    }
    const clause = plan.question.slo.find((clause) => clause.metric === metric);
    // Ends of a logarithmic axis must be round, or its marks cannot be placed.
    const ends = uPlot.rangeLog(Math.min(points[0][0], clause ? clause.bound_s / 2 : Infinity), Math.max(points[points.length - 1][0], clause ? clause.bound_s * 1.6 : 0), 10, false);
    chart(body, () => ({
      scales: { x: { time: false, distr: 3, range: ends }, y: { range: [0, 104] } },
      axes: [axis({ values: (u, at) => at.map((s) => (s === null ? "" : time(s))), space: 60 }), axis({ values: (u, at) => at.map((v) => v + "%") })],
      series: [
        { label: "within", value: (u, s) => (s === null ? "–" : time(s)) },
        { label: metric === "itl" ? "of gaps" : "of requests", stroke: color("best"), fill: color("best-fill"), width: 2, points: { show: false }, value: (u, v) => (v === null ? "–" : number(v, 2) + "%") },
      ],
      hooks: {
        draw: [(u) => {
          if (!clause) return;
          const x = u.valToPos(clause.bound_s, "x", true), y = u.valToPos(100 * clause.share, "y", true);
          line(u, x, u.bbox.top, x, u.bbox.top + u.bbox.height, color("warn"));
          line(u, u.bbox.left, y, u.bbox.left + u.bbox.width, y, color("warn"));
          label(u, "SLO " + time(clause.bound_s), x - 6 * devicePixelRatio, u.bbox.top + u.bbox.height - 8 * devicePixelRatio, color("warn"), "right");
        }],
      },
    }), [points.map(([s]) => s), points.map(([, share]) => 100 * share)]);
    const p = plan.percentiles[metric];
    body.append(make("p", { class: "note" }, ["p50", "p90", "p95", "p99"].map((name) => `${name} ${p[name] === null ? "refused" : time(p[name])}`).join(" · ")));
    return body;
  };

  const compared = () => {
    const bars = plan.profiles.flatMap((profile) => profile.compared);
    const body = card("Predicted over measured", bars.length ? "How far plans of this profile were from what a cluster then did; 1 is exact." : "");
    if (!bars.length) {
      body.append(make("div", { class: "alert" }, "Nothing was compared: no plan of this profile was run on a cluster yet. The intervals on this page hold chance alone. `baton validate` replays the plan and stores what it finds next to the profile."));
      return body;
    }
    const values = bars.map((bar) => 1 + bar.error);
    const reach = Math.max(0.2, ...bars.map((bar) => Math.abs(bar.error))) * 1.25;
    chart(body, () => ({
      scales: { x: { time: false, range: [-0.6, bars.length - 0.4] }, y: { range: [Math.max(0, 1 - reach), 1 + reach] } },
      axes: [axis({ splits: () => bars.map((_, i) => i), values: (u, at) => at.map((i) => (bars[i] ? bars[i].metric : "")), grid: { show: false }, rotate: bars.length > 5 ? -35 : 0, size: bars.length > 5 ? 74 : 40 }), axis({ values: (u, at) => at.map((v) => number(v, 2)) })],
      series: [
        { label: "figure", value: (u, i) => (i === null || !bars[i] ? "–" : `${bars[i].metric} (${bars[i].run})`) },
        { label: "predicted / measured", stroke: color("best"), paths: () => null, points: { show: true, size: 10, fill: color("best") }, value: (u, v) => (v === null ? "–" : number(v, 3)) },
      ],
      hooks: { draw: [(u) => { const y = u.valToPos(1, "y", true); line(u, u.bbox.left, y, u.bbox.left + u.bbox.width, y, color("warn")); }] },
    }), [values.map((_, i) => i), values]);
    return body;
  };

  const regret = () => {
    const body = card("Regret if the mix shifts", "The plan's goodput after a shift, beside the best division of the same nodes that was tried.");
    const rows = plan.regret.map((shift) =>
      shift.unknown !== undefined
        ? { class: "off", cells: [shift.shift, "–", "–", "not known: " + shift.unknown] }
        : [shift.shift + (shift.prompts_cut > 0 ? ` (${percent(shift.prompts_cut)} of prompts cut to the profile's range)` : ""), number(shift.goodput_rps, 2), `${number(shift.best_goodput_rps, 2)} (${shift.best})`, percent(shift.regret, 0)]);
    body.append(table(["shift", ">this plan, req/s", ">best, req/s", ">regret"], rows));
    return body;
  };

  const money = () => {
    const priced = plan.cost_per_hour !== null;
    const body = card("Bottleneck and the next-cheapest fix", plan.bottleneck);
    const rows = plan.fixes.map((fix) => {
      const cells = [fix.fix, fix.gain > 0 ? "+" + percent(fix.gain, 0) : "–"];
      if (priced) cells.push(number(fix.cost_per_hour, 2), fix.cost_per_hour_per_rps === null ? "–" : number(fix.cost_per_hour_per_rps, 2));
      return fix.gain > 0.01 ? cells : { class: "off", cells };
    });
    body.append(table(["what is added", ">rate", ...(priced ? [">per hour", ">per hour and further req/s"] : [])], rows));
    if (!priced) body.append(make("p", { class: "note" }, "Nodes have no price here: give --price, or prices in --nodes."));
    return body;
  };

  const verdicts = () => {
    const body = card("Does the plan beat the others?", "By the 95% interval of the paired difference, with the same requests: yes, no, or cannot tell.", true);
    const rows = plan.divisions.map((one, i) => ({
      class: one.chosen ? "chosen" : one.meets ? "" : "off",
      cells: [i + 1, one.name, one.goodput_rps === null ? "outside the profile" : number(one.goodput_rps, 2), ...plan.question.slo.map((_, k) => (one.attainment.length ? percent(one.attainment[k]) : "–")), one.meets ? "keeps the SLO" : "breaks the SLO", one.chosen ? "chosen" : one.beaten],
    }));
    body.append(make("div", { class: "scroll" }, table([">#", "division", ">req/s within", ...plan.question.slo.map((clause) => ">" + clause.metric), "SLO", "beaten"], rows)));
    return body;
  };

  const nodes = () => {
    const body = card("How the nodes are used");
    body.append(table(["side", "class", ">nodes", ">prefilling", ">decoding", ">KV peak", ">preemptions"],
      plan.utilisation.map((use) => [use.side, use.class, use.nodes, percent(use.prefilling, 0), percent(use.decoding, 0), percent(use.kv_peak, 0), use.preemptions])));
    return body;
  };

  const basis = () => {
    const q = plan.question;
    const body = card("Workload and assumptions");
    const items = [
      q.given,
      `${q.requests.toLocaleString("en")} requests of ${q.trace}: ${number(q.input_tokens_mean, 0)} prompt and ${number(q.output_tokens_mean, 0)} answer tokens on average; ${percent(q.prefix_shared, 0)} of prompt tokens stand in a prefix that an earlier prompt had.`,
      "SLO: " + q.slo.map((clause) => clause.text).join(", ") + `. Routing: ${q.routing_policy}.`,
    ];
    if (q.quantised_s !== null) items.push(`The trace's times are quantised to ${time(q.quantised_s)}; requests were spread evenly by chance over each tick.`);
    for (const profile of plan.profiles) {
      items.push(`Profile ${profile.name}: ${profile.estimated ? "ESTIMATED from data sheets, nobody ran it" : "measured"}. ` + profile.sources.join("; ") + ".");
      for (const residual of profile.residuals) items.push(`${profile.name}, ${residual.table}: 9 of 10 of ${residual.count} measurements within ${percent(residual.p90)} of the profile.`);
    }
    if (plan.by_means) {
      for (const mean of plan.by_means) {
        if (mean.prefill_rps !== null) items.push(`By means, one ${mean.class} node computes ${number(mean.prefill_rps, 2)} prompts/s or decodes ${number(mean.decode_rps, 2)} answers/s (${mean.batch} at once, ${time(mean.step_s)} per step). Means know no queues.`);
      }
    }
    body.append(make("ul", {}, ...items.map((item) => make("li", {}, item))));
    return body;
  };

  const head = () => {
    const title = plan.feasible ? `${plan.name} for ${number(plan.goodput_rps.mid, 2)} good requests/s` : plan.message;
    document.title = "Baton plan: " + title;
    page.append(make("h1", {}, title));
    page.append(make("p", { class: "soft" }, `${plan.profiles.map((profile) => profile.model).filter((name, i, all) => all.indexOf(name) === i).join(", ")} · ${plan.question.trace} · ${plan.question.slo.map((clause) => clause.text).join(", ")}`));
    if (plan.profiles.some((profile) => profile.estimated)) {
      page.append(make("div", { class: "alert" }, "The profile is ESTIMATED from data sheets: nobody ran it. Measure your nodes with `baton profile` before you buy."));
    }
  };

  page.replaceChildren();
  head();
  const cards = make("div", { class: "cards" });
  if (plan.feasible) {
    page.append(tiles(), cards);
    cards.append(
      divisions(),
      distribution("ttft", "Time to first token", "Share of requests whose first token came within the time."),
      distribution("itl", "Time between tokens", "Share of all gaps between tokens that were within the time."),
      money(), compared(), regret(), nodes(), verdicts());
  } else {
    page.append(cards);
  }
  cards.append(basis());
  page.append(make("footer", {}, plan.feasible ? `Baton's planner, ${plan.simulations} simulations with the live routing code. ` : "", "Charts: uPlot, MIT."));
  redraw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      redraw();
    }
  });
})();
