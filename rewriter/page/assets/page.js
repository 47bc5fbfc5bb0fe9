// The page: which stages are drawn, what is open and selected, and what each control does.
"use strict";

class Page {
  constructor(view) {
    this.view = view;
    this.graphs = view.stages.map((stage) => new Graph(view, stage));
    this.layouts = this.graphs.map((graph) => new Layout(graph));
    this.open = view.stages.map((stage) => new Set(stage.open));
    this.step = 0;
    this.withInputs = false;
    this.chosen = null;
    const events = {
      click: (pane, item, event) => this.click(pane, item, event),
      toggle: (pane, id) => this.toggle(pane, id),
      hover: (pane, item, event) => hint(this.hint, pane.graph, item && item.id, event),
      select: (choice) => this.select(choice),
    };
    this.hint = document.getElementById("hint");
    this.panel = document.getElementById("inspector");
    this.status = document.getElementById("status");
    this.panes = ["before", "after"].map((id) => new Pane(document.getElementById(id), view, events));
    this.connect();
    this.draw();
    drawFlops(document.getElementById("flops"), this.graphs.at(-1), (ids, words) => {
      this.goTo(0);
      const chosen = new Set(ids);
      this.lead({ has: (node) => chosen.has(node.id), words });
    });
  }

  // Step 0 is the whole pipeline; step k is the k-th pass.
  stages() {
    const last = this.graphs.length - 1;
    return this.step === 0 ? [0, last] : [this.step - 1, this.step];
  }

  draw() {
    const [a, b] = this.stages();
    const { gone, fresh, changed } = Graph.changes(this.graphs[a], this.graphs[b]);
    const passes = this.step > 0;
    const marks = [passes ? { gone, changed } : {}, passes ? { fresh, changed } : {}];
    this.panes.forEach((pane, i) => {
      const k = [a, b][i];
      pane.draw(this.graphs[k], this.layouts[k], this.open[k], this.withInputs, marks[i]);
      pane.root.querySelector("h3 .stage").textContent = this.view.stages[k].name;
      pane.root.querySelector("h3 .count").textContent = `${this.graphs[k].nodes.size} nodes`;
    });
    this.say(a, b, passes, { gone, fresh, changed });
    document.body.dataset.step = this.step;
  }

  say(a, b, passes, changes) {
    const stage = this.view.stages[b];
    const words = { gone: "gone −", fresh: "new +", changed: "changed ~" };
    const counts = Object.entries(words).map(([mark, word]) =>
      element("span", { class: `mark ${mark}` }, `${changes[mark].size} ${word}`),
    );
    const pass = document.getElementById("pass");
    if (passes)
      pass.replaceChildren(
        element("strong", {}, stage.name),
        ` by ${stage.maker}, ${stage.seconds.toFixed(2)} s: `,
        ...counts,
      );
    else pass.replaceChildren(`The whole pipeline, from ${this.view.stages[a].name} to ${stage.name}`);
    document.getElementById("stages").setAttribute("aria-valuetext", pass.textContent);
    for (const tick of document.querySelectorAll("[data-step]"))
      tick.setAttribute("aria-pressed", String(Number(tick.dataset.step) === this.step));
  }

  goTo(step) {
    if (step === this.step) return;
    this.step = step;
    document.getElementById("stages").value = step;
    this.draw();
    if (this.chosen) this.select(this.chosen);
  }

  index(pane) {
    return this.stages()[this.panes.indexOf(pane)];
  }

  click(pane, item, event) {
    const { graph } = pane;
    pane.roving(item.id);
    if (graph.nodes.has(item.id)) return this.choose(pane, item.id);
    const onTitle = event.type === "keydown" || d3.pointer(event, pane.element(item.id))[1] < TITLE;
    if (!item.open || onTitle) this.toggle(pane, item.id);
    inspect(this.panel, graph, item.id, () => {});
  }

  toggle(pane, id) {
    const open = this.open[this.index(pane)];
    if (!pane.graph.groups.has(id)) return;
    const opening = !open.delete(id);
    if (opening) open.add(id);
    const old = pane.items.get(id);
    this.draw();
    this.stay(pane, old, pane.items.get(id));
    pane.roving(id);
    pane.element(id).focus({ preventScroll: true });
  }

  // Keep what was clicked under the pointer when everything else moves.
  stay(pane, old, now) {
    if (!old || !now) return;
    const { k } = d3.zoomTransform(pane.svg.node());
    pane.svg.call(pane.zoom.translateBy, old.x - now.x, old.y - now.y);
    if (k < 0.25) pane.show([now]);
  }

  choose(pane, id) {
    this.select({ has: (node) => node.id === id, words: id, origin: id, pane });
    inspect(this.panel, pane.graph, id, (other) => this.reveal(pane, other));
  }

  // Open what is around a node, select it and bring it into view.
  reveal(pane, id) {
    if (pane.graph.look(id) === "input") this.showInputs(true);
    for (const name of pane.graph.around(id)) this.open[this.index(pane)].add(name);
    this.draw();
    this.choose(pane, id);
    pane.showSelected();
  }

  // Select all nodes that a choice says, in both drawings.
  select(choice) {
    this.chosen = choice;
    let count = 0;
    for (const pane of this.panes) {
      const ids = choice ? [...pane.graph.nodes.values()].filter(choice.has).map((n) => n.id) : [];
      if (pane === this.panes[1]) count = ids.length;
      pane.select(new Set(ids), choice && choice.pane === pane ? choice.origin : null);
      if (choice && ids.length && !choice.origin) pane.showSelected();
    }
    for (const line of document.querySelectorAll("[data-site], [data-line]"))
      line.classList.toggle("selected", Boolean(choice && choice.from === line));
    this.status.textContent = choice ? `${choice.words}: ${count} ${count === 1 ? "node" : "nodes"} selected` : "";
  }

  // Select from elsewhere on the page, and go to the graphs.
  lead(choice) {
    this.select(choice);
    const behavior = STILL ? "instant" : "smooth";
    document.getElementById("graphs-title").scrollIntoView({ behavior, block: "start" });
  }

  showInputs(on) {
    this.withInputs = on;
    document.getElementById("inputs").checked = on;
  }

  all(open) {
    for (const k of this.stages())
      this.open[k] = new Set(open ? this.mostOf(this.graphs[k]) : []);
    this.draw();
    this.panes.forEach((pane) => pane.fit(false, open ? 0.3 : 0.02));
  }

  // All groups, or as many of them, outer ones first, as a browser draws without a pause.
  mostOf(graph, most = 2500) {
    const found = new Set();
    let shown = graph.members.get("").length, level = graph.members.get("");
    while (level.length) {
      const groups = level.filter((name) => graph.groups.has(name) && graph.look(name) !== "input");
      for (const name of groups) {
        shown += graph.members.get(name).length;
        if (shown <= most) found.add(name);
      }
      level = groups.filter((name) => found.has(name)).flatMap((name) => graph.members.get(name));
    }
    return found;
  }

  search(text) {
    const box = document.getElementById("found");
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    box.replaceChildren();
    this.select(null);
    if (!words.length) return;
    const matches = (node) => {
      const all = [node.id, node.op, node.tensor, node.role, node.kind, node.module, node.where, node.site];
      const said = all.join(" ").toLowerCase();
      return words.every((word) => said.includes(word));
    };
    const pane = this.panes[1];
    const found = [...pane.graph.nodes.values()].filter(matches);
    for (const node of found.slice(0, 60))
      box.append(
        element(
          "button",
          { type: "button", class: `chip look-${node.look}`, title: node.where, click: () => this.reveal(pane, node.id) },
          `${node.id} ${node.tensor}`,
        ),
      );
    if (found.length > 60) box.append(element("span", {}, `and ${found.length - 60} more`));
    this.select({ has: matches, words: `“${text}”` });
    if (!found.length) this.status.textContent = `“${text}”: nothing found`;
  }

  connect() {
    document.querySelector(".track").style.setProperty("--steps", this.graphs.length);
    const on = (id, name, act) => document.getElementById(id).addEventListener(name, act);
    on("stages", "input", (event) => this.goTo(Number(event.target.value)));
    on("search", "input", (event) => this.search(event.target.value));
    on("search", "keydown", (event) => {
      const first = document.querySelector("#found button");
      if (event.key === "Enter" && first) first.click();
    });
    on("inputs", "change", (event) => {
      this.withInputs = event.target.checked;
      this.draw();
    });
    on("expand", "click", () => this.all(true));
    on("collapse", "click", () => this.all(false));
    for (const tick of document.querySelectorAll("[data-step]"))
      if (tick.tagName === "BUTTON") tick.addEventListener("click", () => this.goTo(Number(tick.dataset.step)));
    for (const button of document.querySelectorAll("[data-site]"))
      button.addEventListener("click", () => {
        const name = button.dataset.site;
        this.lead({ has: (node) => node.site === name, words: `site ${name}`, from: button });
      });
    for (const button of document.querySelectorAll("[data-line]"))
      button.addEventListener("click", () => {
        const { path, line } = button.dataset;
        const has = (node) => node.kind !== "input" && node.path === path && node.line === Number(line);
        this.lead({ has, words: `line ${line}`, from: button });
      });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.select(null);
      if (event.key === "/" && event.target.tagName !== "INPUT") {
        event.preventDefault();
        document.getElementById("search").focus();
      }
    });
  }
}

document.getElementById("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});

const started = performance.now();
const data = document.getElementById("view");
if (data) {
  window.page = new Page(JSON.parse(data.textContent));
  document.body.dataset.ready = Math.round(performance.now() - started);
}
