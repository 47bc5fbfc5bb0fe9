// Where the FLOPs go: by role, then by module, each as wide as its share.
"use strict";

function work(graph) {
  const root = { name: "step", look: "", children: new Map(), flops: 0, ids: [] };
  for (const node of graph.nodes.values()) {
    if (!node.flops) continue;
    const parts = node.module ? node.module.split(".") : [node.line ? `line ${node.line}` : "other"];
    let at = root;
    for (const name of [node.role, ...parts]) {
      if (!at.children.has(name))
        at.children.set(name, { name, look: node.look, children: new Map(), flops: 0, ids: [] });
      at = at.children.get(name);
    }
    at.flops += node.flops;
    for (let up = root, i = 0; up; i += 1) {
      up.ids.push(node.id);
      up = up.children.get([node.role, ...parts][i]);
    }
  }
  return root;
}

function drawFlops(box, graph, choose) {
  const root = d3.hierarchy(work(graph), (item) => [...item.children.values()]).sum((item) => item.flops);
  if (!root.value) {
    box.replaceChildren(element("p", {}, "No matrix products or convolutions."));
    return;
  }
  d3.partition()(root);
  const rows = root.height + 1;
  box.style.height = `${rows * 30}px`;
  box.replaceChildren();
  for (const item of root) {
    const share = ((100 * item.value) / root.value).toFixed(1);
    const path = item.ancestors().map((one) => one.data.name).reverse().slice(1).join(" · ");
    const words = `${path || "whole step"}: ${si(item.value)}FLOP, ${share} %`;
    const bar = element(
      "button",
      {
        type: "button",
        class: item.depth ? `bar look-${item.data.look}` : "bar whole",
        title: words,
        "aria-label": words,
        click: () => choose(item.data.ids, words),
      },
    );
    if (box.clientWidth * (item.x1 - item.x0) > 22)
      bar.append(`${item.depth ? item.data.name : "whole step"} `, element("small", {}, `${share} %`));
    else bar.classList.add("thin");
    bar.style.left = `${100 * item.x0}%`;
    bar.style.width = `calc(${100 * (item.x1 - item.x0)}% - 2px)`;
    bar.style.top = `${item.depth * 30}px`;
    box.append(bar);
  }
}
