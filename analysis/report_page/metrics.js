"use strict";
// Figures over training steps: one small plot a figure, all runs in it.

const GROUPS = [
  ["Evaluation", /^evaluation\/(?!level )/],
  ["Training", /^(right|tokens|turns|failed)$/],
  ["Modes", /^(share of modes|right by mode)\//],
  ["Reward", /^reward\//],
  ["Evaluation by level", /^evaluation\/level /],
  ["Learners", /./],
];

function drawMetrics(data, place) {
  const trained = data.runs
    .map((run, number) => ({ run, number }))
    .filter(({ run }) => Object.keys(run.metrics).length);
  if (!trained.length) {
    place.append(
      el("p", { class: "empty" }, "No training run is in this report: its metrics.jsonl would be drawn here."),
    );
    return;
  }
  const names = [...new Set(trained.flatMap(({ run }) => Object.keys(run.metrics)))];
  const grouped = new Map(GROUPS.map(([title]) => [title, []]));
  for (const figure of names) grouped.get(GROUPS.find(([, pattern]) => pattern.test(figure))[0]).push(figure);
  const hidden = new Set();
  const search = el("input", {
    type: "search",
    id: "figure-search",
    placeholder: "Filter figures",
    "aria-label": "Filter figures",
    oninput: draw,
  });
  const plots = el("div", {});
  place.append(
    el(
      "div",
      { class: "page" },
      el(
        "div",
        { class: "bar-of-controls" },
        search,
        trained.map(({ run, number }) =>
          el(
            "label",
            { class: "chip" },
            el("input", {
              type: "checkbox",
              checked: true,
              onchange: (event) => {
                event.target.checked ? hidden.delete(number) : hidden.add(number);
                draw();
              },
            }),
            dot(number),
            name(run.name),
          ),
        ),
      ),
      plots,
    ),
  );

  function draw() {
    const shown = trained.filter(({ number }) => !hidden.has(number)),
      wanted = search.value.toLowerCase();
    plots.replaceChildren(
      ...[...grouped].map(([title, figures]) => {
        const found = figures.filter(
          (figure) => figure.toLowerCase().includes(wanted) && shown.some(({ run }) => figure in run.metrics),
        );
        if (!found.length) return "";
        const open = wanted !== "" || title !== "Evaluation by level";
        return el(
          "details",
          { class: "group", open },
          el("summary", {}, title, el("span", { class: "muted" }, ` ${found.length}`)),
          el(
            "div",
            { class: "plots" },
            found.map((figure) => linePlot(figure, shown)),
          ),
        );
      }),
    );
  }
  draw();
}

/** One figure over the steps of all runs that have it, with the values under the pointer. */
function linePlot(title, runs) {
  const lines = runs
    .filter(({ run }) => title in run.metrics)
    .map(({ run, number }) => ({
      name: run.name,
      number,
      steps: run.metrics[title][0],
      values: run.metrics[title][1],
    }));
  const steps = lines.flatMap((line) => line.steps),
    values = lines.flatMap((line) => line.values);
  const share = /(^|\/)right$|^share of modes|^right by mode|\/clipped$/.test(title);
  const text = share ? (value) => percent(value, Math.max(...values) - Math.min(...values) < 0.05 ? 1 : 0) : figure;
  const ys = range(values);
  const [picture, x, y] = axes(
    `${title} over training steps`,
    { low: Math.min(...steps), high: Math.max(...steps), text: (step) => (Number.isInteger(step) ? whole(step) : "") },
    share ? { low: Math.max(0, ys.low), high: Math.min(1, ys.high), text } : { ...ys, text },
  );
  for (const { number, steps, values } of lines) {
    const points = steps.map((step, at) => [x(step), y(values[at])]);
    picture.append(
      svg("polyline", {
        points: points.map((point) => point.map((value) => value.toFixed(1)).join(",")).join(" "),
        class: "line",
        style: { stroke: colour(number) },
      }),
    );
    if (points.length <= 40)
      for (const [cx, cy] of points) picture.append(svg("circle", { cx, cy, r: 2.2, style: { fill: colour(number) } }));
  }
  const cursor = svg("line", { y1: PLOT.top, y2: PLOT.height - PLOT.bottom, class: "cursor" });
  picture.append(cursor);
  const read = el("span", { class: "reading" });
  const tell = (step) => {
    const near = lines.map((line) =>
      line.steps.reduce(
        (best, other, at) => (Math.abs(other - step) < Math.abs(line.steps[best] - step) ? at : best),
        0,
      ),
    );
    read.replaceChildren(
      `step ${lines[0].steps[near[0]]}`,
      ...lines.map((line, at) => el("span", {}, dot(line.number), text(line.values[near[at]]))),
    );
    const at = x(lines[0].steps[near[0]]);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
  };
  tell(Math.max(...steps));
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width) * PLOT.width;
    tell(
      Math.min(...steps) +
        ((across - PLOT.left) / (PLOT.width - PLOT.left - PLOT.right)) * (Math.max(...steps) - Math.min(...steps)),
    );
    picture.classList.add("read");
  });
  picture.addEventListener("pointerleave", () => {
    picture.classList.remove("read");
    tell(Math.max(...steps));
  });
  return el("figure", { class: "card" }, el("figcaption", {}, el("strong", {}, textNodes(title)), read), picture);
}
