"use strict";
// Runs as wholes: tables with intervals, what came out, and where the tokens went.

function drawOverview(data, place) {
  const played = data.runs.map((run, number) => ({ run, number })).filter(({ run }) => run.whole);
  const graded = played.filter(({ run }) => run.whole.right !== null);
  place.append(
    el(
      "div",
      { class: "page" },
      el("section", {}, el("h2", {}, "Runs"), runsTable(data, played)),
      played.length
        ? el(
            "div",
            { class: "plots wide" },
            graded.length
              ? card("Right over tokens", "each run, with its 95% interval; small dots: its levels", accuracyPlot(graded))
              : null,
            card("Length of dialogues", "sampled tokens of each; what was not right is pale", lengthPlot(data)),
          )
        : null,
      played.length ? el("section", {}, el("h2", {}, "By level"), levelsTable(played)) : null,
      el("section", {}, el("h2", {}, "Second thoughts"), ahaTable(data, played), ahaNote(data)),
      ...played
        .filter(({ run }) => Object.keys(run.steps).length > 1)
        .map(({ run, number }) =>
          el(
            "details",
            { class: "block" },
            el("summary", {}, dot(number), "Kept steps of ", name(run.name)),
            stepsTable(data, run),
          ),
        ),
      ...data.runs
        .filter((run) => Object.keys(run.about).length)
        .map((run) =>
          el("details", { class: "block" }, el("summary", {}, "What ", name(run.name), " is"), aboutTable(run)),
        ),
    ),
  );
}

const name = (text) => el("bdi", {}, textNodes(text));

function card(title, told, ...content) {
  return el(
    "figure",
    { class: "card" },
    el("figcaption", {}, el("strong", {}, title), el("span", { class: "muted" }, told)),
    ...content,
  );
}

/** A table of rows of cells; all but the first cell of each are numbers. A cell is a text or an element. */
function table(headings, rows) {
  const cell = (tag) => (content, column) => el(tag, { class: column ? "number" : null }, content);
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, headings.map(cell("th")))),
      el(
        "tbody",
        {},
        rows.map((row) => el("tr", {}, row.map(cell("td")))),
      ),
    ),
  );
}

/** The accuracy of a row, with its interval as text and as a picture; nothing where nothing was graded. */
function rightCell(row) {
  if (row.right === null) return "";
  const [low, high] = row.interval,
    x = (share) => 2 + 76 * share;
  return el(
    "span",
    { class: "right-cell", title: `95% interval, over problems: ${percent(low)} to ${percent(high)}` },
    svg(
      "svg",
      { viewBox: "0 0 80 12", class: "whisker", "aria-hidden": "true" },
      svg("line", { x1: x(0), x2: x(1), y1: 6, y2: 6, class: "grid" }),
      svg("line", { x1: x(low), x2: x(high), y1: 6, y2: 6, class: "bar" }),
      svg("circle", { cx: x(row.right), cy: 6, r: 3.2, class: "point" }),
    ),
    el("strong", {}, percent(row.right)),
    el("span", { class: "muted" }, `${percent(low)} to ${percent(high)}`),
  );
}

/** What grading found, as a bar; episodes that an exception ended are a part of it. */
function outcomesCell(data, row) {
  const counts = { ...row.outcomes, failed: row.failed };
  const all = row.episodes + row.failed;
  const told = data.outcomes
    .filter((outcome) => counts[outcome])
    .map((outcome) => `${whole(counts[outcome])} ${outcome}`);
  return el(
    "span",
    { class: "outcomes", title: told.join(", "), role: "img", "aria-label": told.join(", ") },
    data.outcomes.map((outcome) =>
      el("i", { class: outcomeClass(outcome), style: { width: percent((counts[outcome] ?? 0) / all, 3) } }),
    ),
  );
}

const outcomeClass = (outcome) => `is-${outcome.replace(" ", "-")}`;

function rowCells(data, row, seats) {
  return [
    whole(row.episodes),
    rightCell(row),
    figure(row.tokens),
    ...seats.map((seat) => (seat in row.seats ? figure(row.seats[seat]) : "")),
    row.turns.toFixed(1),
    ...(data.modes.length ? [row.thinks === null ? "" : percent(row.thinks, 0)] : []),
    percent(row.rethinks / row.episodes, 0),
    outcomesCell(data, row),
  ];
}

function rowHeadings(data, seats) {
  const seatNames = seats.map((seat) => el("span", {}, dot(data.seats.indexOf(seat)), name(seat)));
  return [
    "episodes",
    "right",
    "tokens",
    ...seatNames,
    "turns",
    ...(data.modes.length ? ["thinks"] : []),
    "rethink",
    "outcomes",
  ];
}

const severalSeats = (data) => (data.seats.length > 1 ? data.seats : []);

function runsTable(data, played) {
  const seats = severalSeats(data);
  const rows = played.map(({ run, number }) => [
    el("span", { title: run.path }, dot(number), name(run.name)),
    ...rowCells(data, run.whole, seats),
  ]);
  for (const run of data.runs.filter((run) => !run.whole)) rows.push([name(run.name), "0"]);
  return table(["", ...rowHeadings(data, seats)], rows);
}

function stepsTable(data, run) {
  const seats = severalSeats(data);
  return table(
    ["step", ...rowHeadings(data, seats)],
    Object.entries(run.steps)
      .filter(([, row]) => row)
      .map(([step, row]) => [step, ...rowCells(data, row, seats)]),
  );
}

function levelsTable(played) {
  const levels = [...new Set(played.flatMap(({ run }) => Object.keys(run.levels)))].sort((a, b) => a - b);
  const cell = (row) =>
    row
      ? el(
          "span",
          { title: `${row.episodes} episodes${row.interval ? `, 95% interval ${row.interval.map((end) => percent(end)).join(" to ")}` : ""}` },
          row.right === null ? "" : el("strong", {}, percent(row.right, 0)),
          el("span", { class: "muted" }, ` in ${figure(row.tokens)}`),
        )
      : "";
  return table(
    ["", ...levels.map((level) => `level ${level}`)],
    played.map(({ run, number }) => [
      el("span", {}, dot(number), name(run.name)),
      ...levels.map((level) => cell(run.levels[level])),
    ]),
  );
}

function ahaTable(data, played) {
  const levels = [...new Set(played.flatMap(({ run }) => Object.keys(run.levels)))].sort((a, b) => a - b);
  const share = (row) =>
    row ? el("span", { title: `${row.aha} of ${row.episodes} episodes` }, percent(row.aha / row.episodes)) : "";
  const phrases = Object.keys(data.phrases);
  return table(
    ["", "answers", ...levels.map((level) => `level ${level}`), ...phrases.map((phrase) => `“${phrase}”`)],
    played.map(({ run, number }) => [
      el("span", {}, dot(number), name(run.name)),
      share(run.whole),
      ...levels.map((level) => share(run.levels[level])),
      ...phrases.map((phrase) => whole(run.phrases[phrase] ?? 0)),
    ]),
  );
}

function ahaNote(data) {
  return el(
    "p",
    { class: "muted note" },
    "Share of answers in which some seat says that it overthinks or should rethink, as Long⊗Short counts its “aha” moments " +
      "(arXiv 2505.11827), and how many say each phrase. The paper names no list; looked for, in what was sampled and " +
      "whatever the case: ",
    ...Object.values(data.phrases).flatMap((pattern, at) => [at ? ", " : "", el("code", {}, pattern)]),
    ". A tag such as </rethink> does not count: dialogues with one are in the column rethink.",
  );
}

function aboutTable(run) {
  return el(
    "dl",
    { class: "about" },
    Object.entries(run.about).flatMap(([key, value]) => [
      el("dt", {}, textNodes(key)),
      el("dd", {}, textNodes(String(value))),
    ]),
  );
}

const WIDE = { ...PLOT, width: 480, height: 200 };

function accuracyPlot(played) {
  const rows = played.flatMap(({ run, number }) => [
    ...Object.entries(run.levels)
      .filter(([, row]) => row && row.right !== null)
      .map(([level, row]) => ({ row, number, label: `${run.name}, level ${level}`, small: true })),
    { row: run.whole, number, label: run.name },
  ]);
  const shown = rows.filter(({ small }) => !small || Object.keys(played[0].run.levels).length > 1);
  const [picture, x, y] = axes(
    "Right over tokens",
    range(
      shown.map(({ row }) => row.tokens),
      { from: 0 },
    ),
    {
      low: Math.max(0, Math.min(...shown.map(({ row }) => row.interval[0])) - 0.05),
      high: 1,
      text: (share) => percent(share, 0),
    },
    WIDE,
  );
  for (const { row, number, label, small } of shown) {
    const [low, high] = row.interval;
    const told = svg("title", {}, `${label}: ${percent(row.right)} right in ${figure(row.tokens)} tokens`);
    if (!small)
      picture.append(
        svg("line", {
          x1: x(row.tokens),
          x2: x(row.tokens),
          y1: y(low),
          y2: y(high),
          class: "bar",
          style: { stroke: colour(number) },
        }),
      );
    picture.append(
      svg(
        "circle",
        {
          cx: x(row.tokens),
          cy: y(row.right),
          r: small ? 2.5 : 5,
          class: small ? "faint" : "",
          style: { fill: colour(number) },
        },
        told,
      ),
    );
  }
  return picture;
}

function lengthPlot(data) {
  const { tokens, outcome } = data.episodes;
  const most = tokens.reduce((a, b) => Math.max(a, b), 1);
  const marks = ticks(0, most, 24),
    wide = marks[1] - marks[0];
  const all = new Array(Math.floor(most / wide) + 1).fill(0),
    right = all.slice();
  tokens.forEach((count, episode) => {
    all[Math.floor(count / wide)]++;
    if (outcome[episode] === 0) right[Math.floor(count / wide)]++;
  });
  const [picture, x, y] = axes(
    "Length of dialogues",
    { low: 0, high: all.length * wide },
    { low: 0, high: Math.max(...all) * 1.05 },
    WIDE,
  );
  all.forEach((count, at) => {
    const bar = (height, kind) =>
      svg(
        "rect",
        {
          x: x(at * wide) + 0.75,
          width: Math.max(1, x(wide) - x(0) - 1.5),
          y: y(height),
          height: y(0) - y(height),
          class: kind,
        },
        svg(
          "title",
          {},
          `${figure(at * wide)} to ${figure((at + 1) * wide)} tokens: ${count} episodes, ${right[at]} right`,
        ),
      );
    if (count) picture.append(bar(count, "bar-all"), bar(right[at], "bar-right"));
  });
  return picture;
}
