// Where everything goes: dagre lays out the members of one open group at a time, inner groups first.
"use strict";

// The same as in layout.py, but for what an open graph's marks need.
const CHARACTER = 6.7, HEIGHT = 36, MARGIN = 14, TITLE = 22;

class Layout {
  constructor(graph) {
    this.graph = graph;
    this.levels = new Map();
  }

  // Return items and edges with positions, for the groups that are open.
  arrange(open, withInputs) {
    const found = { items: [], edges: [] };
    const level = this.level("", open, withInputs);
    this.place(level, 0, 0, 0, found);
    return { ...found, width: level.width, height: level.height };
  }

  level(name, open, withInputs) {
    const key = JSON.stringify([name, withInputs, ...this.openInside(name, open)]);
    if (!this.levels.has(key)) this.levels.set(key, this.compute(name, open, withInputs));
    return this.levels.get(key);
  }

  openInside(name, open) {
    const found = [];
    for (const member of this.graph.members.get(name))
      if (open.has(member)) found.push(member, ...this.openInside(member, open));
    return found;
  }

  compute(name, open, withInputs) {
    const { graph } = this;
    const dag = new dagre.graphlib.Graph({ multigraph: false });
    dag.setGraph({ ranksep: 26, nodesep: 16, edgesep: 10, ranker: "tight-tree" });
    dag.setDefaultEdgeLabel(() => ({}));
    const inner = new Map();
    for (const member of graph.members.get(name)) {
      const { title, about, look } = graph.one(member);
      if (!withInputs && look === "input") continue;
      if (open.has(member)) {
        const level = this.level(member, open, withInputs);
        inner.set(member, level);
        const head = (title + about).length * CHARACTER + 54;
        dag.setNode(member, {
          width: Math.max(level.width + 2 * MARGIN, head),
          height: level.height + MARGIN + TITLE + MARGIN / 2,
        });
      } else {
        const longest = Math.max(title.length + (graph.groups.has(member) ? 7 : 0), about.length);
        dag.setNode(member, { width: Math.max(64, longest * CHARACTER + 28), height: HEIGHT });
      }
    }
    const edges = (graph.stage.edges[name] || [])
      .map(([from, to, count]) => ({ from, to, count }))
      .filter((edge) => dag.hasNode(edge.from) && dag.hasNode(edge.to));
    for (const edge of edges) dag.setEdge(edge.from, edge.to, { weight: edge.count });
    this.wrap(dag);
    dagre.layout(dag);
    const { width, height } = dag.nodeCount() ? dag.graph() : { width: 0, height: 0 };
    const members = dag.nodes().map((id) => ({ id, ...dag.node(id), inner: inner.get(id) }));
    for (const edge of edges) edge.points = dag.edge(edge.from, edge.to).points;
    return { members, edges, width, height };
  }

  // Nodes without edges would all stand in one row: invisible edges make them several.
  wrap(dag) {
    const alone = dag.nodes().filter((id) => !dag.nodeEdges(id).length);
    const columns = Math.max(3, Math.ceil(Math.sqrt(alone.length / 2)));
    for (let i = columns; i < alone.length; i += 1) dag.setEdge(alone[i - columns], alone[i], {});
  }

  place(level, x, y, depth, found) {
    for (const { from, to, count, points } of level.edges)
      found.edges.push({ from, to, count, depth, points: points.map((p) => [p.x + x, p.y + y]) });
    for (const member of level.members) {
      const { id, width, height, inner } = member;
      const left = x + member.x - width / 2, top = y + member.y - height / 2;
      const item = { id, x: left, y: top, width, height, depth, open: Boolean(inner) };
      found.items.push(item);
      if (inner) {
        const spare = (width - inner.width) / 2;
        this.place(inner, left + spare, top + TITLE + MARGIN / 2, depth + 1, found);
      }
    }
  }
}
