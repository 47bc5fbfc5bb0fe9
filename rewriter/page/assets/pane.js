// One drawing of a graph: items and edges as SVG, zoomed and panned by d3, walked by arrow keys.
"use strict";

const STILL = matchMedia("(prefers-reduced-motion: reduce)").matches;

function outline(look, width, height) {
  const { corners } = look, cut = HEIGHT / 3, r = height / 2;
  if (!corners.length) {
    const arc = `A${r} ${r} 0 0 1`;
    return `M${r} 0H${width - r}${arc} ${width - r} ${height}H${r}${arc} ${r} 0Z`;
  }
  const points = corners.map(([a, b, c, d]) => `${a * width + b * cut} ${c * height + d * cut}`);
  return "M" + points.join("L") + "Z";
}

class Pane {
  constructor(root, view, events) {
    this.root = root;
    this.view = view;
    this.events = events;
    this.svg = d3.select(root).select("svg");
    this.world = this.svg.append("g").attr("class", "world");
    this.boxes = this.world.append("g");
    this.lines = this.world.append("g");
    this.near = this.world.append("g");
    this.tops = this.world.append("g");
    this.zoom = d3.zoom().scaleExtent([0.02, 4]).on("zoom", (event) => {
      this.world.attr("transform", event.transform);
    });
    this.svg.call(this.zoom).on("dblclick.zoom", null);
    this.svg.on("click", (event) => {
      if (event.target === this.svg.node()) events.select(null);
    });
    this.svg.on("keydown", (event) => this.key(event));
    for (const button of root.querySelectorAll("[data-zoom]"))
      button.addEventListener("click", () => this.zoomBy(button.dataset.zoom));
    this.open = new Set();
  }

  zoomBy(how) {
    if (how === "fit") this.fit();
    else this.moving().call(this.zoom.scaleBy, how === "in" ? 1.4 : 1 / 1.4);
  }

  moving() {
    return STILL ? this.svg : this.svg.transition().duration(300);
  }

  // Draw a graph; marks says which nodes are new, gone or changed.
  draw(graph, layout, open, withInputs, marks) {
    const other = this.graph !== graph;
    Object.assign(this, { graph, open, marks });
    this.drawn = layout.arrange(open, withInputs);
    this.items = new Map(this.drawn.items.map((item) => [item.id, item]));
    this.drawItems(this.boxes, this.drawn.items.filter((item) => item.open));
    this.drawItems(this.tops, this.drawn.items.filter((item) => !item.open));
    this.drawEdges();
    this.roving();
    this.select(this.selection || new Set(), this.origin);
    if (other) this.fit(true);
  }

  drawItems(layer, items) {
    const { graph, events } = this;
    layer
      .selectAll("g.item")
      .data(items, (item) => item.id + (item.open ? " open" : ""))
      .join((enter) => {
        const made = enter.append("g").attr("tabindex", -1);
        made.append("path").attr("class", "behind");
        made.append("path").attr("class", "outline");
        made.append("text").attr("class", "title");
        made.append("text").attr("class", "about");
        made
          .on("click", (event, item) => events.click(this, item, event))
          .on("mouseenter focus", (event, item) => events.hover(this, item, event))
          .on("mouseleave blur", () => events.hover(this, null));
        return made;
      })
      .attr("class", (item) => `item ${this.classes(item)}`)
      .attr("data-id", (item) => item.id)
      .attr("role", "button")
      .attr("aria-label", (item) => this.spoken(item))
      .attr("aria-expanded", (item) => (graph.groups.has(item.id) ? String(item.open) : null))
      .attr("transform", (item) => `translate(${item.x},${item.y})`)
      .each((item, index, all) => this.fill(d3.select(all[index]), item));
  }

  fill(made, item) {
    const look = this.view.looks[this.graph.look(item.id)];
    const { title, about } = this.graph.one(item.id);
    const { width, height } = item;
    const shape = item.open
      ? `M6 0H${width - 6}A6 6 0 0 1 ${width} 6V${height - 6}A6 6 0 0 1 ${width - 6} ${height}` +
        `H6A6 6 0 0 1 0 ${height - 6}V6A6 6 0 0 1 6 0Z`
      : outline(look, width, height);
    made.select(".outline").attr("d", shape);
    const closed = this.graph.groups.has(item.id) && !item.open;
    made.select(".behind").attr("d", closed ? shape : "").attr("transform", "translate(4,4)");
    if (item.open) {
      made.select(".title").attr("x", 10).attr("y", 16).text(`▾ ${title}`);
      made.select(".about").attr("x", width - 10).attr("y", 16).text(about);
    } else {
      const mark = closed ? "▸ " : "";
      const [what, count] = this.mark(this.inside(item.id));
      const sign = { fresh: "+", gone: "−", changed: "~" }[what];
      const tail = sign ? ` ${sign}${closed ? count : ""}` : "";
      const middle = about ? 15 : 22;
      made.select(".title").attr("x", width / 2).attr("y", middle).text(mark + title + tail);
      made.select(".about").attr("x", width / 2).attr("y", 28).text(about);
    }
  }

  classes(item) {
    const inside = this.inside(item.id);
    const kind = this.graph.groups.has(item.id) ? (item.open ? "group open" : "group") : "node";
    return [kind, `look-${this.graph.look(item.id)}`, item.open ? "" : this.mark(inside)[0]].join(" ");
  }

  // What the pass did to most of these nodes, and to how many: ["fresh", 12]; ["", 0] for nothing.
  mark(inside) {
    const counts = Object.entries(this.marks || {}).map(([mark, ids]) => [
      mark,
      inside.filter((id) => ids.has(id)).length,
    ]);
    const most = d3.greatest(counts, ([, count]) => count);
    return most && most[1] ? most : ["", 0];
  }

  // All nodes that an item stands for.
  inside(id) {
    if (this.graph.nodes.has(id)) return [id];
    return this.graph.members.get(id).flatMap((member) => this.inside(member));
  }

  spoken(item) {
    const node = this.graph.nodes.get(item.id);
    if (!node) {
      const group = this.graph.groups.get(item.id);
      return `${group.look} ${group.label}, ${group.count} nodes`;
    }
    const what = node.kind === "call" ? `${node.role} ${node.op}` : node.kind;
    return `${what} ${node.id}, ${node.tensor}, ${node.where || "line unknown"}`;
  }

  drawEdges() {
    const line = d3.line().curve(d3.curveBasis);
    this.lines
      .selectAll("path")
      .data(this.drawn.edges, (edge) => `${edge.from}\n${edge.to}`)
      .join("path")
      .attr("class", "edge")
      .attr("marker-end", "url(#arrow)")
      .attr("stroke-width", (edge) => 1.1 + Math.min(2, Math.log2(edge.count) / 2))
      .attr("d", (edge) => line(edge.points));
  }

  // Light up nodes; with one origin, show what it reads and who uses it, wherever they are.
  select(ids, origin) {
    this.selection = ids;
    this.origin = origin;
    if (!this.graph) return;
    const held = new Map();
    for (const id of ids)
      if (this.graph.nodes.has(id)) {
        const shown = this.graph.shown(id, this.open);
        held.set(shown, (held.get(shown) || 0) + 1);
      }
    this.world.selectAll("g.item").classed("selected", (item) => held.has(item.id));
    this.root.classList.toggle("choosing", held.size > 0);
    this.svg.attr("data-selected", held.size);
    this.drawNear(origin);
  }

  drawNear(origin) {
    const node = origin && this.graph.nodes.get(origin);
    const pairs = [];
    if (node) {
      for (const id of node.inputs) pairs.push([id, origin, "reads"]);
      for (const id of this.graph.users.get(origin) || []) pairs.push([origin, id, "used"]);
    }
    const centre = (id) => {
      const item = this.graph.nodes.has(id) && this.items.get(this.graph.shown(id, this.open));
      return item && [item.x + item.width / 2, item.y + item.height / 2, item.height / 2];
    };
    const link = d3.linkVertical();
    const ends = pairs
      .map(([a, b, kind]) => [centre(a), centre(b), kind])
      .filter(([a, b]) => a && b);
    this.near
      .selectAll("path")
      .data(ends)
      .join("path")
      .attr("class", ([, , kind]) => `near ${kind}`)
      .attr("d", ([a, b]) => link({ source: [a[0], a[1] + a[2]], target: [b[0], b[1] - b[2]] }));
  }

  fit(atOnce = false, least = 0.02) {
    this.show(this.drawn.items, atOnce, 1, least);
  }

  // Bring items into view; what does not fit at the least scale is cut off at the bottom.
  show(items, atOnce = false, most = 1.2, least = 0.02) {
    const { width, height } = this.svg.node().getBoundingClientRect();
    if (!items.length || !width) return;
    const left = d3.min(items, (i) => i.x), right = d3.max(items, (i) => i.x + i.width);
    const top = d3.min(items, (i) => i.y), bottom = d3.max(items, (i) => i.y + i.height);
    const fitting = Math.min(most, (width - 32) / (right - left), (height - 32) / (bottom - top));
    const scale = Math.max(fitting, least);
    const y = Math.max((height - scale * (bottom - top)) / 2, 16);
    const to = d3.zoomIdentity
      .translate(width / 2, y)
      .scale(scale)
      .translate(-(left + right) / 2, -top);
    (atOnce ? this.svg : this.moving()).call(this.zoom.transform, to);
  }

  showSelected() {
    this.show(this.drawn.items.filter((item) => this.holds(item)));
  }

  holds(item) {
    return !item.open && this.inside(item.id).some((id) => this.selection.has(id));
  }

  // One item of each drawing is in the order of the Tab key; arrow keys go on from there.
  roving(id) {
    const all = this.world.selectAll("g.item");
    const first = id || (this.items.has(this.focused) ? this.focused : all.size() && all.datum().id);
    this.focused = first;
    all.attr("tabindex", (item) => (item.id === first ? 0 : -1));
  }

  element(id) {
    return this.world.selectAll("g.item").filter((item) => item.id === id).node();
  }

  key(event) {
    const item = this.items.get(this.focused);
    const way = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    if (event.key === "+" || event.key === "-") this.zoomBy(event.key === "+" ? "in" : "out");
    else if (event.key === "0") this.fit();
    else if (event.key === "Enter" && item) this.events.click(this, item, event);
    else if (event.key === " " && item) this.events.toggle(this, item.id);
    else if (way[event.key] && item) this.walk(item, way[event.key]);
    else return;
    event.preventDefault();
  }

  walk(from, [dx, dy]) {
    const middle = (i) => [i.x + i.width / 2, i.y + (i.open ? TITLE / 2 : i.height / 2)];
    const [x, y] = middle(from);
    const next = d3.least(
      this.drawn.items.filter((item) => {
        const [a, b] = middle(item);
        return item !== from && (a - x) * dx + (b - y) * dy > 1;
      }),
      (item) => {
        const [a, b] = middle(item);
        const along = Math.abs((a - x) * dx + (b - y) * dy);
        return along + 3 * Math.abs((a - x) * dy + (b - y) * dx);
      },
    );
    if (!next) return;
    this.roving(next.id);
    this.element(next.id).focus();
    this.keepInView(next);
  }

  keepInView(item) {
    const { width, height } = this.svg.node().getBoundingClientRect();
    const now = d3.zoomTransform(this.svg.node());
    const [x, y] = now.apply([item.x + item.width / 2, item.y]);
    if (x < 20 || y < 20 || x > width - 20 || y > height - 20)
      this.moving().call(this.zoom.translateTo, item.x + item.width / 2, item.y);
  }
}
