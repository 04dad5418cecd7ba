"use strict";
// The data that stands in the page: blocks of compressed JSON, unpacked when they are looked at.

/** The JSON in the block of that name. */
async function unpack(name) {
  const packed = atob(document.getElementById(name).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let at = 0; at < packed.length; at++) bytes[at] = packed.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Records of episodes in blocks, of which the last few stay unpacked. */
class Blocks {
  static KEPT = 16;

  constructor(name, firsts) {
    this.name = name;
    this.firsts = firsts; // the number of the first episode of each block
    this.unpacked = new Map();
  }

  /** All records of one block. */
  block(number) {
    const found = this.unpacked.get(number) ?? unpack(`${this.name}-${number}`);
    this.unpacked.delete(number); // and put back as the latest
    this.unpacked.set(number, found);
    if (this.unpacked.size > Blocks.KEPT) this.unpacked.delete(this.unpacked.keys().next().value);
    return found;
  }

  /** The record of one episode. */
  async record(episode) {
    let low = 0,
      high = this.firsts.length - 1;
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (this.firsts[middle] <= episode) low = middle;
      else high = middle - 1;
    }
    return (await this.block(low))[episode - this.firsts[low]];
  }
}

/** What the report holds. Episodes are numbered in the order of the index, whose columns tell of each. */
class Data {
  static async open() {
    const data = new Data();
    Object.assign(data, await unpack("index"));
    data.count = data.episodes.run.length;
    data.said = new Blocks("said", data.blocks.said);
    data.tokens = new Blocks("tokens", data.blocks.tokens);
    data.samples = data.problems.map(() => []); // the episodes on each problem
    data.episodes.problem.forEach((problem, episode) => data.samples[problem].push(episode));
    data.searchable = [];
    return data;
  }

  run(episode) {
    return this.runs[this.episodes.run[episode]];
  }
  problem(episode) {
    const [id, level, question, subject] = this.problems[this.episodes.problem[episode]];
    return { id, level, question, subject };
  }
  outcome(episode) {
    return this.outcomes[this.episodes.outcome[episode]];
  }
  mode(episode) {
    return this.modes[this.episodes.mode[episode]] ?? null;
  }

  /** What the run calls it, with its training step. */
  place(episode) {
    const step = this.episodes.step[episode];
    return this.run(episode).name + (step === null ? "" : ` · step ${step}`);
  }

  /** The episodes on the same problem: first those of the same group, which were sampled together. */
  siblings(episode) {
    const apart = (other) =>
      Number(this.episodes.run[other] !== this.episodes.run[episode]) * 2 +
      Number(this.episodes.step[other] !== this.episodes.step[episode]);
    return this.samples[this.episodes.problem[episode]].slice().sort((a, b) => apart(a) - apart(b) || a - b);
  }

  /** Whether two episodes were sampled together, so that one is measured against the other. */
  together(a, b) {
    return ["run", "step", "problem"].every((name) => this.episodes[name][a] === this.episodes[name][b]);
  }

  /** What the ids of each vocabulary read. */
  texts() {
    this.readTexts ??= unpack("vocabularies");
    return this.readTexts;
  }

  /** Unpacks the words of all conversations, block by block, so that they can be searched. */
  async readAll(onBlock) {
    for (let number = this.readBlocks ?? 0; number < this.said.firsts.length; number++) {
      const records = await unpack(`said-${number}`);
      for (const one of records) {
        const turns = one.turns.map((turn) => turn.prefill + turn.text);
        this.searchable.push([one.id, one.statement, one.answer ?? "", one.error ?? "", ...turns].join("\n"));
      }
      this.readBlocks = number + 1;
      if (!onBlock()) return;
    }
  }
}
