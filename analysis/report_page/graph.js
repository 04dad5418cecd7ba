"use strict";
// The graph that the dialogues went through, as their successive states show it.

const BOX = { height: 58, row: 128, gap: 150 };

function drawGraph(data, place) {
  const played = data.runs.map((run, number) => ({ run, number })).filter(({ run }) => run.edges.length);
  if (!played.length) place.append(el("p", { class: "empty" }, "No episode is in this report."));
  place.append(
    el(
      "div",
      { class: "page" },
      played.map(({ run, number }) =>
        el(
          "figure",
          { class: "card" },
          el(
            "figcaption",
            {},
            el("strong", {}, dot(number), name(run.name)),
            el(
              "span",
              { class: "muted" },
              "share of those who left a state that took an edge, and how often; as thick as often",
            ),
          ),
          el("div", { class: "scroll" }, graphPicture(data, run)),
        ),
      ),
    ),
  );
}

/** The states of a run in columns, and its edges: each with how often it was taken, by which closing tags. */
function collectGraph(run) {
  const edges = new Map(),
    left = new Map();
  for (const [from, to, tag, count] of run.edges) {
    const key = JSON.stringify([from, to]);
    if (!edges.has(key)) edges.set(key, { from, to, count: 0, tags: [] });
    edges.get(key).count += count;
    edges.get(key).tags.push([tag, count]);
    left.set(from, (left.get(from) ?? 0) + count);
  }
  for (const edge of edges.values()) edge.share = edge.count / left.get(edge.from);
  const layers = new Map([["\0start", 0]]),
    queue = ["\0start"];
  const final = (node) => node === "end" || node === "\0failed";
  while (queue.length) {
    const node = queue.shift();
    for (const { from, to } of edges.values()) {
      if (from !== node || layers.has(to) || final(to)) continue;
      layers.set(to, layers.get(node) + 1);
      queue.push(to);
    }
  }
  const last = Math.max(...layers.values()) + 1;
  for (const { to } of edges.values()) if (final(to)) layers.set(to, last);
  return { edges: [...edges.values()], layers, last };
}

function graphPicture(data, run) {
  const { edges, layers, last } = collectGraph(run);
  const label = (node) => ({ "\0start": "start", "\0failed": "failed" })[node] ?? node;
  const told = (node) => {
    const state = run.states[node];
    return state
      ? [state.seats.join(" + "), `${whole(state.visits)} × ${figure(state.tokens / state.visits)} tokens`]
      : [];
  };
  const width = (node) => 28 + 7 * Math.max(label(node).length, ...told(node).map((text) => text.length * 0.95));

  // Places: columns from left to right; in each, in the order of those that lead there.
  const at = new Map();
  let across = 20;
  for (let layer = 0; layer <= last; layer++) {
    const column = [...layers.keys()].filter((node) => layers.get(node) === layer);
    const before = (node) => {
      const rows = edges.filter((edge) => edge.to === node && at.has(edge.from)).map((edge) => at.get(edge.from).y);
      return rows.length ? rows.reduce((a, b) => a + b) / rows.length : 0;
    };
    // What leads back does so from below.
    const back = (node) => edges.some((edge) => edge.from === node && layers.get(edge.to) <= layer);
    column.sort((a, b) => before(a) - before(b) || back(a) - back(b));
    const wide = Math.max(0, ...column.map(width));
    column.forEach((node, row) =>
      at.set(node, { x: across + wide / 2, y: (row - (column.length - 1) / 2) * BOX.row, width: width(node) }),
    );
    across += wide + BOX.gap;
  }
  const picture = svg("svg", { class: "graph", role: "img", "aria-label": "Graph of the protocol" });
  const arrow = svg(
    "marker",
    {
      id: `arrow-${data.runs.indexOf(run)}`,
      viewBox: "0 0 10 10",
      refX: 9,
      refY: 5,
      markerWidth: 12,
      markerHeight: 11,
      markerUnits: "userSpaceOnUse",
      orient: "auto-start-reverse",
    },
    svg("path", { d: "M0 0L10 5L0 10z", class: "arrow" }),
  );
  picture.append(svg("defs", {}, arrow));
  let top = Math.min(...[...at.values()].map(({ y }) => y)) - BOX.height / 2,
    bottom = -top;
  const most = Math.max(...edges.map((edge) => edge.count)),
    labels = [];
  edges.forEach((edge) => {
    const from = at.get(edge.from),
      to = at.get(edge.to),
      columns = layers.get(edge.to) - layers.get(edge.from);
    let curve;
    if (columns === 1) {
      const x1 = from.x + from.width / 2,
        x2 = to.x - to.width / 2 - 2,
        bend = (x2 - x1) * 0.45;
      curve = [
        [x1, from.y],
        [x1 + bend, from.y],
        [x2 - bend, to.y],
        [x2, to.y],
      ];
    } else if (columns > 1) {
      // over what stands between
      const high = Math.min(from.y, to.y) - BOX.height / 2 - 34 * columns;
      curve = [
        [from.x + 14, from.y - BOX.height / 2],
        [from.x + 40, high],
        [to.x - 40, high],
        [to.x, to.y - BOX.height / 2 - 2],
      ];
    } else {
      // back, below
      const low = Math.max(from.y, to.y) + BOX.height / 2 + 62 - 26 * columns,
        turn = columns === 0 ? 46 : 14;
      curve = [
        [from.x - (turn / 2) * (columns === 0 ? -1 : 1), from.y + BOX.height / 2],
        [from.x + (columns === 0 ? turn : -turn), low],
        [to.x + (columns === 0 ? -turn : turn), low],
        [to.x + (turn / 2) * (columns === 0 ? -1 : 1), to.y + BOX.height / 2 + 2],
      ];
    }
    const [a, b, c, d] = curve,
      middle = [0, 1].map((axis) => (a[axis] + 3 * b[axis] + 3 * c[axis] + d[axis]) / 8);
    top = Math.min(top, middle[1] - 24);
    bottom = Math.max(bottom, middle[1] + 24);
    const tags = edge.tags.map(([tag, count]) => `${tag || "no tag"}: ${whole(count)}`).join("\n");
    picture.append(
      svg(
        "path",
        {
          d: `M${a}C${b} ${c} ${d}`,
          class: "edge",
          "marker-end": `url(#${arrow.id})`,
          style: { "stroke-width": `${1.2 + 5 * (edge.count / most)}px` },
        },
        svg("title", {}, `${label(edge.from)} to ${label(edge.to)}, ${whole(edge.count)} times\n${tags}`),
      ),
    );
    const closing = edge.tags
      .map(([tag]) => tag)
      .filter(Boolean)
      .join(" ");
    labels.push(
      svg(
        "text",
        { x: middle[0], y: middle[1] - (closing ? 3 : -4), class: "edge-label" },
        closing ? svg("tspan", { class: "tag" }, closing) : null,
        svg(
          "tspan",
          closing ? { x: middle[0], dy: 14 } : {},
          edge.share < 1
            ? `${percent(edge.share, edge.share < 0.1 ? 1 : 0)} · ${whole(edge.count)}`
            : whole(edge.count),
        ),
      ),
    );
  });
  for (const [node, { x, y, width }] of at) {
    const state = run.states[node],
      height = state ? BOX.height : 32;
    const seat = state ? data.seats.indexOf(state.seats[0]) : null;
    const lines = [label(node), ...told(node)];
    picture.append(
      svg(
        "g",
        { class: state ? "state" : "state ends" },
        svg("rect", {
          x: x - width / 2,
          y: y - height / 2,
          width,
          height,
          rx: state ? 9 : 16,
          style: seat === null ? {} : { "--own": colour(seat) },
        }),
        ...lines.map((line, at) =>
          svg(
            "text",
            { x, y: y + 4 + (at - (lines.length - 1) / 2) * 16, class: at ? "middle detail" : "middle" },
            line,
          ),
        ),
      ),
    );
  }
  picture.append(...labels);
  const box = [0, top - 10, across - BOX.gap + 20, bottom - top + 20];
  picture.setAttribute("viewBox", box.join(" "));
  picture.style.width = `${box[2]}px`;
  picture.style.height = `${box[3]}px`;
  return picture;
}
