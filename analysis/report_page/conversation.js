"use strict";
// One conversation: who said what, what it was graded and paid, and each token of it.

const LONGEST = 20000; // characters of a turn that are shown at once
const MOST_TOKENS = 3000;
const COLOURINGS = { probability: "log-probability", advantage: "advantage", mask: "mask" };

/** The conversation as an element. `look` says whether and how tokens are shown, and what is marked. */
async function conversation(data, episode, look, actions) {
  const [one, tokens, texts] = await Promise.all([
    data.said.record(episode),
    look.tokens ? data.tokens.record(episode) : null,
    look.tokens ? data.texts() : null,
  ]);
  const outcome = data.outcome(episode),
    problem = data.problem(episode),
    mode = data.mode(episode);
  const ungraded = outcome === "ungraded";
  const given = one.answer === null ? "no answer" : ["answered ", el("code", {}, textNodes(one.answer, look.mark))];
  return el(
    "article",
    { class: "conversation", "data-episode": episode },
    el(
      "header",
      {},
      el("h2", {}, textNodes(one.id, look.mark)),
      el(
        "p",
        { class: "facts" },
        el("span", { class: `badge ${outcomeClass(outcome)}` }, outcome),
        ungraded ? null : el("span", {}, given),
        ungraded ? null : el("span", {}, "right is ", el("code", {}, textNodes(one.gold))),
        el(
          "span",
          {},
          `${whole(data.episodes.tokens[episode])} tokens in ${one.turns.length} ${one.turns.length === 1 ? "turn" : "turns"}`,
        ),
        mode ? el("span", {}, "chose ", el("code", {}, textNodes(mode))) : null,
        problem.level ? el("span", {}, `level ${problem.level}`) : null,
        problem.subject ? el("span", {}, textNodes(problem.subject)) : null,
        el("span", { class: "muted" }, textNodes(data.place(episode))),
      ),
      one.error ? el("p", { class: "fault" }, textNodes(one.error, look.mark)) : null,
      samples(data, episode, actions),
    ),
    el("div", { class: "problem", dir: "auto" }, longText(one.statement, look.mark)),
    one.turns.map((turn, at) => turnCard(data, one, at, tokens && tokens[at], texts, look)),
    one.rewards ? rewardsTable(data, one) : null,
    one.solution
      ? el(
          "details",
          { class: "block" },
          el("summary", {}, "Worked solution"),
          el("div", { class: "said", dir: "auto" }, longText(one.solution, look.mark)),
        )
      : null,
  );
}

/** A button for each episode on the same problem: those of the group, then others. */
function samples(data, episode, actions) {
  const others = data.siblings(episode);
  if (others.length < 2) return null;
  const button = (other) =>
    el(
      "button",
      {
        class: `sample ${outcomeClass(data.outcome(other))}`,
        "aria-current": other === episode ? "true" : null,
        title: `${data.place(other)}, sample ${data.episodes.sample[other]}: ${data.outcome(other)} in ${data.episodes.tokens[other]} tokens. Shift-click: side by side`,
        onclick: (event) => (event.shiftKey ? actions.compare(other) : actions.open(other, episode)),
      },
      el("b", {}, `#${data.episodes.sample[other]}`),
      ` ${whole(data.episodes.tokens[other])} ${data.outcome(other)}`,
    );
  const group = others.filter((other) => data.together(other, episode)),
    rest = others.filter((other) => !data.together(other, episode));
  return el(
    "div",
    { class: "samples" },
    el("span", { class: "muted" }, group.length > 1 ? "group" : "problem"),
    group.map(button),
    rest.length ? el("span", { class: "muted" }, "elsewhere") : null,
    rest.slice(0, 24).map(button),
    rest.length > 24 ? el("span", { class: "muted" }, `and ${rest.length - 24} more`) : null,
  );
}

/** A text, at first no more of it than can be shown at once. */
function longText(text, mark) {
  if (text.length <= LONGEST) return textNodes(text, mark);
  const more = el(
    "button",
    { class: "quiet", onclick: () => more.replaceWith(...textNodes(text.slice(LONGEST), mark)) },
    `… show all ${whole(text.length)} characters`,
  );
  return [...textNodes(text.slice(0, LONGEST), mark), more];
}

function turnCard(data, one, at, tokens, texts, look) {
  const turn = one.turns[at],
    seat = data.seats.indexOf(turn.seat);
  const advantage = one.advantages ? one.advantages[at] : undefined;
  const ended = {
    stop: ["ended by ", el("code", {}, textNodes(turn.stop ?? ""))],
    end: "ended by itself",
    length: "cut off at its budget",
  }[turn.finish];
  const logs = tokens ? tokens.logs.filter((value) => value !== null) : [];
  return el(
    "section",
    { class: "turn", style: { "--own": colour(Math.max(0, seat)) } },
    el(
      "header",
      {},
      el("b", { class: "seat" }, name(turn.seat)),
      el("span", {}, textNodes(turn.state)),
      el("span", {}, `${whole(turn.tokens)} ${turn.tokens === 1 ? "token" : "tokens"}`),
      el("span", {}, ended),
      logs.length
        ? el(
            "span",
            { title: "mean log-probability of a token" },
            `log p ${signed(logs.reduce((a, b) => a + b, 0) / logs.length)}`,
          )
        : null,
      advantage === undefined
        ? null
        : el(
            "span",
            { class: advantage === null ? "muted" : `advantage ${advantage < 0 ? "less" : "more"}` },
            advantage === null ? "not trained" : `advantage ${signed(advantage)}`,
          ),
      turn.model ? el("span", { class: "muted" }, name(turn.model), turn.version ? ` v${turn.version}` : "") : null,
    ),
    tokens && tokens.said.length
      ? tokenView(turn, tokens, texts, advantage, look)
      : el(
          "div",
          { class: "said", dir: "auto" },
          turn.prefill
            ? el(
                "span",
                { class: "prefill", title: "put into its mouth by the protocol" },
                textNodes(turn.prefill, look.mark),
              )
            : null,
          longText(turn.text, look.mark),
        ),
    tokens && !tokens.said.length
      ? el("p", { class: "muted note" }, "No token ids: this seat was filled by an agent that works on text.")
      : null,
  );
}

function rewardsTable(data, one) {
  const seats = Object.keys(one.rewards),
    terms = [...new Set(seats.flatMap((seat) => Object.keys(one.rewards[seat])))];
  const total = (seat) => Object.values(one.rewards[seat]).reduce((a, b) => a + b, 0);
  return el(
    "section",
    { class: "rewards" },
    table(
      ["reward", ...terms.map((term) => name(term)), "total"],
      seats.map((seat) => [
        el("span", {}, dot(data.seats.indexOf(seat)), name(seat)),
        ...terms.map((term) => (term in one.rewards[seat] ? signed(one.rewards[seat][term]) : "")),
        el("strong", {}, signed(total(seat))),
      ]),
    ),
  );
}

// Tokens

/** What a seat read and said in one turn, token by token. */
function tokenView(turn, tokens, texts, advantage, look) {
  const vocabulary = texts[tokens.vocabulary] ?? null;
  const read = tokens.read.map((id) => ({ id, mask: "only read" }));
  // Without a credit log nobody knows who was trained: these tokens could have been.
  const mask = advantage === undefined ? "sampled" : advantage === null ? "sampled, not trained" : "trained";
  const said = tokens.said.map((id, at) => ({ id, mask, log: tokens.logs[at] ?? null, advantage: advantage ?? null }));
  const all = [...(look.read ? read : []), ...said];
  const place = el("div", { class: `tokens by-${look.colouring}`, role: "group", "aria-label": "Tokens" });
  const show = (from) => {
    place.append(...all.slice(from, from + MOST_TOKENS).map((token, at) => tokenElement(token, vocabulary, from + at)));
    if (from + MOST_TOKENS >= all.length) return;
    const more = el(
      "button",
      {
        class: "quiet",
        onclick: () => {
          more.remove();
          show(from + MOST_TOKENS);
        },
      },
      `… ${whole(all.length - from - MOST_TOKENS)} more tokens`,
    );
    place.append(more);
  };
  show(0);
  const parts = [place];
  if (look.read && !tokens.continues && tokens.read.length)
    place.prepend(el("span", { class: "muted note" }, "read from the beginning: "));
  if (!vocabulary)
    parts.push(
      el(
        "p",
        { class: "muted note" },
        "Ids, since this tokenizer is not known: turnwise report --tokenizer FOLDER. As text:",
      ),
      el("div", { class: "said" }, longText(turn.prefill + turn.text, look.mark)),
    );
  return el("div", {}, parts);
}

function tokenElement(token, vocabulary, number) {
  const text = vocabulary ? (vocabulary[token.id] ?? `⟨${token.id}⟩`) : String(token.id);
  const shown = textNodes(text.replace(/\n+/g, (lines) => `${"⏎".repeat(lines.length)}\n`));
  const strength = Math.sqrt(Math.min(1, Math.abs(token.advantage ?? 0)));
  const element = el(
    "span",
    {
      class: `token ${token.mask === "only read" ? "read-only" : token.mask === "trained" ? "trained" : "sampled"} ${vocabulary ? "" : "id"} ${(token.advantage ?? 0) < 0 ? "less" : "more"}`,
      tabindex: number ? "-1" : "0",
      style: {
        "--surprise": percent(Math.min(1, -(token.log ?? 0) / 3), 1),
        "--strength": percent(0.55 * strength, 1),
      },
    },
    shown.length ? shown : "␀",
  );
  element.token = { ...token, text };
  return element;
}

/** One line that tells everything of a token. */
function tokenLine(token) {
  const part = (label, value) => el("span", {}, el("span", { class: "muted" }, `${label} `), value);
  return [
    el("code", {}, textNodes(JSON.stringify(token.text))),
    part("id", String(token.id)),
    token.log === undefined ? null : part("log-probability", token.log === null ? "none" : signed(token.log, 4)),
    token.log === undefined || token.log === null ? null : part("probability", percent(Math.exp(token.log), 2)),
    part("mask", token.mask),
    token.advantage === undefined || token.advantage === null ? null : part("advantage", signed(token.advantage, 4)),
  ];
}

/** Tells of the token under the pointer or with the focus in `place`; the arrow keys go from token to token. */
function watchTokens(place, line) {
  const tell = (event) => {
    const token = event.target.closest?.(".token");
    if (token) line.replaceChildren(...tokenLine(token.token).filter(Boolean));
  };
  place.addEventListener("mouseover", tell);
  place.addEventListener("focusin", tell);
  place.addEventListener("click", (event) => event.target.closest?.(".token")?.focus());
  place.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !event.target.matches(".token")) return;
    const all = [...place.querySelectorAll(".token")];
    all[all.indexOf(event.target) + step]?.focus();
    event.preventDefault();
  });
}
