// What is known of one node or group, in words: beside the graphs, and in a hint at the pointer.
"use strict";

function si(number) {
  for (const prefix of ["", "k", "M", "G", "T"]) {
    if (Math.abs(number) < 999.5) return Number(number.toPrecision(3)) + " " + prefix;
    number /= 1000;
  }
  return Number(number.toPrecision(3)) + " P";
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "click") made.addEventListener("click", value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function facts(graph, id) {
  const node = graph.nodes.get(id);
  if (!node) {
    const group = graph.groups.get(id);
    return [
      ["group", group.label],
      ["role", group.look],
      ["nodes", String(group.count)],
      ["price", group.flops ? `${si(group.flops)}FLOP` : "no products"],
    ];
  }
  const formula = node.flops ? ` = ${node.flops_formula}` : "";
  return [
    ["node", node.kind === "input" ? `${node.title} (${node.id})` : node.id],
    ["operator", node.op],
    ["shape", node.tensor],
    ["role", node.kind === "call" ? node.role : node.kind],
    ["module", node.module || "none"],
    ["price", (node.flops ? `${si(node.flops)}FLOP${formula}` : "no product") + `, ${si(node.bytes)}B`],
    ["from", node.where || "unknown"],
    ["site", node.site || "none"],
    ["made by", node.stage],
  ];
}

function list(graph, id) {
  const made = element("dl");
  for (const [name, value] of facts(graph, id))
    if (value !== "none") made.append(element("dt", {}, name), element("dd", {}, value));
  return made;
}

// Fill the panel with a node's facts and its neighbours as buttons.
function inspect(panel, graph, id, choose) {
  panel.replaceChildren(list(graph, id));
  const node = graph.nodes.get(id);
  if (!node) return;
  const neighbours = (title, ids) => {
    const known = ids.filter((other) => graph.nodes.has(other));
    if (!known.length) return;
    const buttons = known.slice(0, 40).map((other) =>
      element("button", { type: "button", class: `chip look-${graph.look(other)}`, click: () => choose(other) }, other),
    );
    if (known.length > 40) buttons.push(element("span", {}, `and ${known.length - 40} more`));
    panel.append(element("h4", {}, title), element("div", { class: "chips" }, ...buttons));
  };
  neighbours("reads", node.inputs);
  neighbours("used by", graph.users.get(id) || []);
}

function hint(box, graph, id, event) {
  if (!id) {
    box.hidden = true;
    return;
  }
  box.replaceChildren(list(graph, id));
  box.hidden = false;
  const target = event.currentTarget.getBoundingClientRect();
  const x = event.clientX || target.right, y = event.clientY || target.bottom;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(x + 16, innerWidth - width - 8))}px`;
  box.style.top = `${y + height + 24 > innerHeight ? Math.max(4, y - height - 12) : y + 16}px`;
}
