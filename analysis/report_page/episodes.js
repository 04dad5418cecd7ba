"use strict";
// All conversations: a list to search and filter, and beside it the one that is open, or two of one problem.

const ROW = 62; // pixels, as in the style sheet

class Episodes {
  constructor(data, place) {
    this.data = data;
    this.open = this.other = null; // episodes
    this.look = { tokens: false, read: false, colouring: "probability", mark: null };
    this.chosen = { outcomes: new Set(), rethink: false, aha: false, long: false };
    this.matching = Array.from({ length: data.count }, (_, episode) => episode);
    this.longest = this.thresholds();
    this.build(place);
    this.filter();
  }

  /** Of each run, the tokens of the shortest among the longest tenth of its dialogues. */
  thresholds() {
    const { run, tokens } = this.data.episodes,
      lengths = this.data.runs.map(() => []);
    run.forEach((number, episode) => lengths[number].push(tokens[episode]));
    return lengths.map((found) => found.sort((a, b) => b - a)[Math.ceil(found.length / 10) - 1] ?? 0);
  }

  // What it is made of

  build(place) {
    const { data } = this;
    this.search = el("input", {
      type: "search",
      id: "search",
      placeholder: "Search words, ids, answers; /regex/",
      "aria-label": "Search",
      autocomplete: "off",
      oninput: () => this.searched(),
    });
    this.told = el("p", { class: "told", role: "status" });
    this.rows = el("div", { class: "rows" });
    this.list = el(
      "div",
      {
        class: "list",
        id: "list",
        role: "listbox",
        tabindex: "0",
        "aria-label": "Conversations",
        onscroll: () => this.drawRows(),
      },
      this.rows,
    );
    this.pane = el("div", { class: "pane", id: "pane", role: "region", tabindex: "0", "aria-label": "What is open" });
    this.line = el("div", { class: "token-line", id: "token-line", role: "status" });
    this.controls = el("div", { class: "bar-of-controls look" });
    this.side = el("aside", { class: "side" }, this.search, this.filters(), this.told, this.list);
    this.detail = el("section", { class: "detail" }, this.controls, this.pane, this.line);
    this.whole = el("div", { class: "episodes" }, this.side, this.detail);
    place.append(this.whole);
    watchTokens(this.pane, this.line);
    this.list.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (step) {
        this.move(step);
        event.preventDefault();
      }
    });
    new ResizeObserver(() => this.drawRows()).observe(this.list);
    this.drawControls();
  }

  filters() {
    const { data, chosen } = this;
    const chip = (id, label, checked, change, kind = "") =>
      el(
        "label",
        { class: `chip ${kind}` },
        el("input", {
          type: "checkbox",
          id,
          checked,
          onchange: (event) => {
            change(event.target.checked);
            this.filter();
          },
        }),
        label,
      );
    const counts = data.outcomes.map(
      (_, number) => data.episodes.outcome.filter((outcome) => outcome === number).length,
    );
    const outcomes = data.outcomes.flatMap((outcome, number) =>
      counts[number]
        ? [
            chip(
              `outcome-${outcome.replace(" ", "-")}`,
              `${outcome} ${whole(counts[number])}`,
              false,
              (on) => (on ? chosen.outcomes.add(number) : chosen.outcomes.delete(number)),
              outcomeClass(outcome),
            ),
          ]
        : [],
    );
    const some = (column) => data.episodes[column].some((value) => value > 0);
    const choice = (id, label, options) =>
      options.length > 1
        ? el(
            "select",
            {
              id,
              "aria-label": label,
              onchange: () => {
                chosen[id] = this.whole.querySelector(`#${id}`).value;
                this.filter();
              },
            },
            el("option", { value: "" }, label),
            options.map(([value, text]) => el("option", { value: String(value) }, text)),
          )
        : null;
    const values = (column) =>
      [...new Set(data.episodes[column])].filter((value) => value !== null).sort((a, b) => a - b);
    const levels = [...new Set(data.problems.map(([, level]) => level))].sort((a, b) => a - b);
    return el(
      "div",
      { class: "filters" },
      el(
        "div",
        {},
        outcomes,
        some("rethinks") ? chip("rethink", "rethink", false, (on) => (chosen.rethink = on)) : null,
        some("aha") ? chip("aha", "aha", false, (on) => (chosen.aha = on)) : null,
        chip("long", "longest 10%", false, (on) => (chosen.long = on)),
      ),
      el(
        "div",
        {},
        choice(
          "run",
          "all runs",
          data.runs.map((run, number) => [number, run.name]),
        ),
        choice(
          "step",
          "all steps",
          values("step").map((step) => [step, `step ${step}`]),
        ),
        choice(
          "level",
          "all levels",
          levels.map((level) => [level, `level ${level}`]),
        ),
        data.modes.length
          ? choice(
              "mode",
              "all modes",
              data.modes.map((mode, number) => [number, mode]),
            )
          : null,
        choice("order", "as played", [
          ["long", "longest first"],
          ["short", "shortest first"],
          ["problem", "by problem"],
        ]),
      ),
    );
  }

  drawControls() {
    const { look } = this;
    const toggle = (id, label, key, on, change) =>
      el(
        "label",
        { class: "chip", title: `key ${key}` },
        el("input", {
          type: "checkbox",
          id,
          checked: on,
          onchange: (event) => {
            change(event.target.checked);
            this.show();
          },
        }),
        label,
      );
    const comparable = this.open !== null && this.data.siblings(this.open).length > 1;
    this.controls.replaceChildren(
      el("button", { class: "quiet back", id: "back", onclick: () => this.close() }, "‹ list"),
      toggle("tokens", "tokens", "t", look.tokens, (on) => (look.tokens = on)),
      ...(look.tokens
        ? [
            el(
              "select",
              {
                id: "colouring",
                "aria-label": "Colour tokens by",
                title: "key v",
                onchange: (event) => {
                  look.colouring = event.target.value;
                  this.show();
                },
              },
              Object.entries(COLOURINGS).map(([value, text]) =>
                el("option", { value, selected: value === look.colouring }, text),
              ),
            ),
            toggle("read", "what was read", "r", look.read, (on) => (look.read = on)),
            legend(look.colouring),
          ]
        : []),
      el("span", { class: "grow" }),
      comparable
        ? toggle(
            "compare",
            "side by side",
            "c",
            this.other !== null,
            (on) => (this.other = on ? this.partner(this.open) : null),
          )
        : "",
    );
  }

  // What is found

  searched() {
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => this.readAndFilter(), 120);
  }

  async readAndFilter() {
    const wanted = this.search.value.trim(),
      regex = /^\/(.+)\/$/.exec(wanted);
    let pattern = null;
    try {
      pattern = wanted ? new RegExp(regex ? regex[1] : wanted.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "gi") : null;
    } catch (error) {
      this.told.textContent = `Not a regular expression: ${error.message}`;
      return;
    }
    this.look.mark = pattern;
    this.show();
    this.filter();
    if (!pattern || this.reading) return;
    this.reading = true;
    let filtered = performance.now();
    await this.data.readAll(() => {
      if (performance.now() - filtered > 250) {
        this.filter();
        filtered = performance.now();
      }
      return this.look.mark !== null;
    });
    this.reading = false;
    this.filter();
  }

  filter() {
    const { data, chosen } = this,
      { episodes, problems, searchable } = data;
    const pattern = this.look.mark && new RegExp(this.look.mark.source, "i");
    const same = (name, value) => chosen[name] === undefined || chosen[name] === "" || Number(chosen[name]) === value;
    this.matching = [];
    for (let at = 0; at < data.count; at++) {
      if (
        (!chosen.outcomes.size || chosen.outcomes.has(episodes.outcome[at])) &&
        (!chosen.rethink || episodes.rethinks[at]) &&
        (!chosen.aha || episodes.aha[at]) &&
        (!chosen.long || episodes.tokens[at] >= this.longest[episodes.run[at]]) &&
        same("run", episodes.run[at]) &&
        same("step", episodes.step[at]) &&
        same("mode", episodes.mode[at]) &&
        same("level", problems[episodes.problem[at]][1]) &&
        (!pattern || (at < searchable.length && pattern.test(searchable[at])))
      )
        this.matching.push(at);
    }
    const { tokens, problem } = episodes;
    const order = {
      long: (a, b) => tokens[b] - tokens[a] || a - b,
      short: (a, b) => tokens[a] - tokens[b] || a - b,
      problem: (a, b) => problem[a] - problem[b] || a - b,
    }[chosen.order];
    if (order) this.matching.sort(order);
    this.tell();
    this.list.scrollTop = 0;
    this.drawRows();
  }

  tell() {
    const { data, matching } = this,
      { outcome, tokens } = data.episodes;
    const finished = matching.filter((episode) => data.outcome(episode) !== "failed"),
      graded = finished.filter((episode) => data.outcome(episode) !== "ungraded");
    const right = graded.filter((episode) => outcome[episode] === 0).length,
      sum = finished.reduce((all, episode) => all + tokens[episode], 0);
    const reading = this.reading ? `, reading ${percent(data.searchable.length / data.count, 0)}` : "";
    this.told.textContent =
      `${whole(matching.length)} of ${whole(data.count)}` +
      (graded.length ? ` · ${percent(right / graded.length)} right` : "") +
      (finished.length ? ` · ${figure(sum / finished.length)} tokens` : "") +
      reading;
  }

  /** The rows that are in view, and no others. */
  drawRows() {
    const { data, matching, list } = this;
    this.rows.style.height = `${matching.length * ROW}px`;
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4),
      last = Math.min(matching.length, first + Math.ceil(list.clientHeight / ROW) + 8);
    this.rows.replaceChildren(
      ...matching.slice(first, last).map((episode, at) => {
        const { question } = data.problem(episode),
          { tokens, turns, rethinks, aha } = data.episodes;
        return el(
          "div",
          {
            class: `row ${outcomeClass(data.outcome(episode))}`,
            role: "option",
            id: `row-${episode}`,
            "aria-selected": String(episode === this.open),
            style: { top: `${(first + at) * ROW}px` },
            onclick: () => this.select(episode),
          },
          el("span", { class: "question" }, textNodes(question)),
          el(
            "span",
            { class: "small muted" },
            el("b", {}, `#${data.episodes.sample[episode]}`),
            el("span", { class: "outcome" }, data.outcome(episode)),
            el("span", { class: "where" }, textNodes(data.place(episode))),
            el("span", { class: "grow" }),
            aha[episode] ? el("i", { title: "says that it overthinks or should rethink" }, "aha") : null,
            rethinks[episode]
              ? el("i", { title: `asked ${rethinks[episode]} times to think again` }, `↺${rethinks[episode]}`)
              : null,
            data.mode(episode) ? el("code", {}, textNodes(data.mode(episode))) : null,
            el("span", {}, `${turns[episode]} × `, el("b", {}, whole(tokens[episode]))),
          ),
        );
      }),
    );
    if (this.open !== null) list.setAttribute("aria-activedescendant", `row-${this.open}`);
  }

  // What is open

  /** Opens an episode, alone, and brings its row into view. */
  select(episode) {
    this.open = episode;
    this.other = null;
    this.reveal();
    return this.show();
  }

  reveal() {
    const at = this.matching.indexOf(this.open),
      { list } = this;
    if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
    this.drawRows();
  }

  move(step) {
    const at = this.matching.indexOf(this.open),
      to = at < 0 ? 0 : Math.min(this.matching.length - 1, Math.max(0, at + step));
    if (this.matching.length) this.select(this.matching[to]);
  }

  /** The episode on the same problem that comes `step` after one, never the one that is open. */
  next(episode, step) {
    const all = this.data.siblings(this.open),
      { length } = all;
    let at = all.indexOf(episode) + step;
    if (all[(at + length) % length] === this.open) at += step;
    return all[(at + length) % length];
  }

  /** What an episode is best held against: one of its group that ended otherwise, or else the next on the problem. */
  partner(episode) {
    const { data } = this,
      others = data.siblings(episode).filter((other) => other !== episode);
    return (
      others.find((other) => data.together(other, episode) && data.outcome(other) !== data.outcome(episode)) ??
      others[0] ??
      null
    );
  }

  /** The next sample on the same problem: beside the open one where two are, else in its place. */
  turnOver(step) {
    if (this.open === null || this.data.siblings(this.open).length < 2) return;
    if (this.other === null) this.select(this.next(this.open, step));
    else {
      this.other = this.next(this.other, step);
      this.show();
    }
  }

  compare(other = null) {
    if (this.open === null) return;
    if (other === null && this.other === null) other = this.partner(this.open);
    this.other = other === this.open ? null : other;
    this.show();
  }

  close() {
    if (this.other !== null) this.other = null;
    else this.open = null;
    this.drawRows();
    this.show();
  }

  async show() {
    const number = (this.shown = (this.shown ?? 0) + 1);
    const { data, look } = this,
      actions = {
        compare: (other) => this.compare(other),
        open: (other, from) => {
          // in the place of the one whose button it was
          if (this.other === null) this.select(other);
          else if (other !== this.open && other !== this.other) {
            if (from === this.open) this.open = other;
            else this.other = other;
            this.show();
          }
        },
      };
    const shown = [this.open, this.other].filter((episode) => episode !== null);
    const parts = await Promise.all(shown.map((episode) => conversation(data, episode, look, actions)));
    if (number !== this.shown) return; // another one was opened meanwhile
    const focusAgain = keptFocus(this.controls, this.pane);
    const same = this.pane.dataset.shown === shown.join(),
      { scrollTop } = this.pane;
    this.pane.replaceChildren(
      ...(parts.length
        ? parts
        : [
            el(
              "p",
              { class: "empty" },
              data.count ? "Open a conversation: click one, or press j." : "No episode is in this report.",
            ),
          ]),
    );
    this.pane.dataset.shown = shown.join();
    this.pane.scrollTop = same ? scrollTop : 0;
    this.whole.classList.toggle("opened", shown.length > 0);
    this.pane.classList.toggle("two", shown.length > 1);
    this.line.hidden = !look.tokens || !shown.length;
    this.line.replaceChildren(el("span", { class: "muted" }, "Point at a token, or go through them by ← and →."));
    this.drawControls();
    focusAgain();
    this.onShown?.(shown);
  }
}

/**
 * A function that gives the focus back to what stands where the focused element of `controls` or `pane` stood, once
 * they are drawn anew: of the controls the one with its id, of the pane the one at its place, or else the pane itself.
 */
function keptFocus(controls, pane) {
  const focused = document.activeElement,
    { id } = focused;
  if (controls.contains(focused)) return () => (document.getElementById(id) ?? pane).focus();
  if (!pane.contains(focused)) return () => {};
  const path = [];
  for (let at = focused; at !== pane; at = at.parentElement) path.unshift([...at.parentElement.children].indexOf(at));
  return () => {
    path.reduce((at, child) => at?.children[child], pane)?.focus({ preventScroll: true });
    if (!pane.contains(document.activeElement)) pane.focus({ preventScroll: true });
  };
}

function legend(colouring) {
  const sample = (kind, text, style = {}) => el("span", { class: `token ${kind}`, style }, text);
  return el(
    "span",
    { class: `legend by-${colouring}` },
    {
      probability: [
        sample("sampled", "sure", { "--surprise": "0%" }),
        sample("sampled", "surprising", { "--surprise": "70%" }),
      ],
      advantage: [sample("less", "worse", { "--strength": "50%" }), sample("more", "better", { "--strength": "50%" })],
      mask: [sample("trained", "trained"), sample("sampled", "sampled"), sample("read-only", "only read")],
    }[colouring],
  );
}
