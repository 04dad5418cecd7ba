"use strict";
// The page: its parts as tabs, its keys, and what of it stands in the address.

const PARTS = {
  overview: ["Overview", drawOverview],
  metrics: ["Metrics", drawMetrics],
  conversations: ["Conversations", null],
  graph: ["Graph", drawGraph],
};
const KEYS = [
  ["1 … 4", "overview, metrics, conversations, graph"],
  ["/", "search"],
  ["j  k", "next, previous conversation"],
  ["t", "tokens"],
  ["v", "colour tokens by the next thing"],
  ["r", "what was read before"],
  ["←  →", "next, previous token, where one has the focus"],
  ["c", "two samples of the problem side by side"],
  ["[  ]", "another sample of the problem"],
  ["Esc", "close, leave the search"],
  ["?", "these keys"],
];

class Page {
  constructor(data) {
    this.data = data;
    this.parts = {};
    this.help = document.getElementById("help");
    document
      .getElementById("keys")
      .append(...KEYS.flatMap(([key, told]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, told)]));
    document.getElementById("help-button").addEventListener("click", () => this.help.showModal());
    document
      .getElementById("tabs")
      .append(
        ...Object.entries(PARTS).map(([part, [title]], at) =>
          el(
            "button",
            { role: "tab", id: `tab-${part}`, title: `key ${at + 1}`, onclick: () => this.turnTo(part) },
            title,
            part === "conversations" ? el("span", { class: "muted count" }, whole(data.count)) : null,
          ),
        ),
      );
    document.addEventListener("keydown", (event) => this.pressed(event));
    document.title = `${data.runs
      .map((run) => run.name)
      .join(", ")
      .slice(0, 120)} · turnwise report`;
    this.restore();
  }

  /** Shows a part; it is drawn when it is first looked at. */
  turnTo(part) {
    if (!this.parts[part]) {
      const place = (this.parts[part] = el("div", {
        class: "part",
        role: "tabpanel",
        tabindex: part === "conversations" ? null : "0", // what scrolls, by the arrow keys
        "aria-labelledby": `tab-${part}`,
      }));
      document.getElementById("main").append(place);
      if (part === "conversations") {
        this.episodes = new Episodes(this.data, place);
        this.episodes.onShown = () => this.remember();
      } else PARTS[part][1](this.data, place);
    }
    this.part = part;
    for (const [other, place] of Object.entries(this.parts)) place.hidden = other !== part;
    for (const other of Object.keys(PARTS))
      document.getElementById(`tab-${other}`).setAttribute("aria-selected", String(other === part));
    if (part === "conversations") {
      this.episodes.drawRows();
      if (this.episodes.open === null && !this.episodes.shown) this.episodes.show();
    }
    this.remember();
  }

  remember() {
    const shown =
      this.part === "conversations"
        ? [this.episodes.open, this.episodes.other].filter((episode) => episode !== null)
        : [];
    location.replace(`#${[this.part, ...shown].join("/")}`);
  }

  restore() {
    const [part, ...shown] = location.hash.slice(1).split("/");
    const [open, other] = shown
      .map(Number)
      .map((episode) => (Number.isInteger(episode) && episode >= 0 && episode < this.data.count ? episode : null));
    this.turnTo(part in PARTS ? part : "overview");
    if (this.part !== "conversations" || open === undefined || open === null) return;
    this.episodes.select(open);
    if (other !== undefined && other !== null) this.episodes.compare(other);
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.help.open) return;
    const writing = event.target.matches("input[type=search], select");
    if (writing && event.key === "Escape") event.target.blur();
    if (writing) return;
    const parts = Object.keys(PARTS),
      { episodes } = this;
    const key = event.key;
    const check = (id) => document.getElementById(id)?.click();
    if (key === "?") this.help.showModal();
    else if (key >= "1" && key <= String(parts.length)) this.turnTo(parts[key - 1]);
    else if (key === "/") {
      if (this.part === "metrics") document.getElementById("figure-search")?.focus();
      else {
        this.turnTo("conversations");
        this.episodes.search.focus();
      }
    } else if (key === "j" || key === "k") {
      this.turnTo("conversations");
      this.episodes.move(key === "j" ? 1 : -1);
    } else if (this.part !== "conversations") return;
    else if (key === "t") check("tokens");
    else if (key === "r") check("read");
    else if (key === "v" && episodes.look.tokens) {
      const all = Object.keys(COLOURINGS);
      episodes.look.colouring = all[(all.indexOf(episodes.look.colouring) + 1) % all.length];
      episodes.show();
    } else if (key === "c") episodes.compare();
    else if (key === "]" || key === "[") episodes.turnOver(key === "]" ? 1 : -1);
    else if (key === "Escape") episodes.close();
    else return;
    event.preventDefault();
  }
}

(async () => {
  const loading = document.getElementById("loading");
  try {
    window.page = new Page(await Data.open());
    loading.remove();
    document.documentElement.dataset.ready = String(Math.round(performance.now())); // ms since it was opened
  } catch (error) {
    loading.textContent = `The report cannot be shown: ${error}`;
    throw error;
  }
})();
