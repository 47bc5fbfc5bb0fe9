// One stage's graph: nodes, the groups around them, and who uses whom.
"use strict";

class Graph {
  constructor(view, stage) {
    this.stage = stage;
    this.groups = new Map(Object.entries(stage.groups));
    this.nodes = new Map();
    this.members = new Map([["", []]]);
    this.users = new Map();
    for (const name of this.groups.keys()) this.members.set(name, []);
    for (const [name, group] of this.groups) {
      group.name = name;
      this.members.get(group.parent).push(name);
    }
    for (const number of stage.nodes) {
      const node = view.pool[number];
      this.nodes.set(node.id, node);
      this.members.get(node.group).push(node.id);
    }
    for (const node of this.nodes.values())
      for (const source of node.inputs)
        if (this.nodes.has(source)) {
          if (!this.users.has(source)) this.users.set(source, []);
          this.users.get(source).push(node.id);
        }
  }

  parent(name) {
    return this.nodes.has(name) ? this.nodes.get(name).group : this.groups.get(name).parent;
  }

  // The groups around a node or group, outermost first.
  around(name) {
    const found = [];
    for (let at = this.parent(name); at; at = this.groups.get(at).parent) found.unshift(at);
    return found;
  }

  // A node or a group: both have title, about and look.
  one(name) {
    return this.nodes.get(name) || this.groups.get(name);
  }

  look(name) {
    return this.one(name).look;
  }

  // What stands for a node in a drawing with these groups open: itself, or a closed group.
  shown(id, open) {
    return this.around(id).find((name) => !open.has(name)) || id;
  }

  // What became of each node between two stages.
  static changes(before, after) {
    const gone = new Set(), fresh = new Set(), changed = new Set();
    for (const id of before.nodes.keys()) if (!after.nodes.has(id)) gone.add(id);
    for (const [id, node] of after.nodes) {
      const old = before.nodes.get(id);
      if (!old) fresh.add(id);
      else if (Graph.says(old) !== Graph.says(node)) changed.add(id);
    }
    return { gone, fresh, changed };
  }

  static says(node) {
    return JSON.stringify([node.op, node.kind, node.tensor, node.inputs]);
  }
}
