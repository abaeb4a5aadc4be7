// The document viewer. The data is described in viewer.py: texts by index, probabilities in units of 1/unit.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const element = (id) => document.getElementById(id);
  const text = (index) => data.texts[index];
  const visible = (string) => (string === "" ? "∅" : string.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍"));
  const percent = (units) => ((100 * units) / data.unit).toFixed(units < data.unit / 1000 ? 2 : 1);
  const mark = (index) => (index < 0 ? "var(--none)" : `var(--m${index % 5})`);
  let positions = []; // of the shown document, in order: {record, button, index, segment}

  function make(tag, properties = {}, children = []) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  function view() {
    return data.views[Number(element("view").value)];
  }

  function fillDocuments() {
    const options = view().documents.map((part, index) => {
      const size = part.segments.reduce((sum, segment) => sum + segment.tokens.length, 0);
      return make("option", { value: index, textContent: `document ${part.doc} (shard ${part.shard}, ${size} tokens)` });
    });
    const before = element("doc").selectedIndex;
    element("doc").replaceChildren(...options);
    element("doc").selectedIndex = Math.min(Math.max(before, 0), options.length - 1);
    const names = [view().target, ...view().sources];
    const entries = names.map((name, index) => make("span", {}, [swatch(mark(index)), `${name}${index ? "" : " (target)"}`]));
    element("legend").replaceChildren(...entries, make("span", {}, [swatch(mark(-1)), "no distribution"]));
  }

  function swatch(color) {
    const node = make("i");
    node.style.background = color;
    return node;
  }

  function showDocument() {
    const chosen = view().documents[Number(element("doc").value)];
    const keep = positions.findIndex((part) => part.button.hasAttribute("aria-current"));
    positions = [];
    for (const segment of chosen ? chosen.segments : []) {
      const bare = segment.bare ? new Set(segment.bare) : null;
      segment.tokens.forEach((token, index) => {
        const isBare = bare ? bare.has(index) : index === 0 && text(token).startsWith("<");
        positions.push({ record: segment.positions[index], token: text(token), index, segment: segment.segment, isBare });
      });
    }
    positions.forEach((part, index) => {
      const bare = part.isBare;
      part.button = make("span", { className: `token ${index % 2 ? "odd" : "even"}${bare ? " bare" : ""}`, tabIndex: -1, textContent: part.token || "∅" });
      part.button.setAttribute("role", "button");
      part.button.style.setProperty("--mark", mark(part.record.w));
      part.button.addEventListener("click", () => select(index));
    });
    element("document").replaceChildren(...laidOut(chosen ? chosen.segments : []));
    if (positions.length) select(keep >= 0 && keep < positions.length ? keep : Math.min(1, positions.length - 1), false);
  }

  // Tokens as they follow each other; those of a conversation in a bubble for each message.
  function laidOut(segments) {
    const buttons = positions.map((part) => part.button);
    const nodes = [];
    let at = 0;
    for (const segment of segments) {
      const first = at;
      for (const [role, length, isLearnt] of segment.turns || []) {
        const label = `${role}${isLearnt ? "" : ", context"}`;
        const head = make("div", { className: "role", textContent: label });
        const bubble = make("div", { className: `message ${role === "user" ? "right" : "left"}${isLearnt ? " learnt" : ""}` }, [head, ...buttons.slice(at, at + length)]);
        bubble.setAttribute("role", "group");
        bubble.setAttribute("aria-label", label);
        nodes.push(bubble);
        at += length;
      }
      nodes.push(...buttons.slice(at, first + segment.tokens.length)); // all of them, of a plain text
      at = first + segment.tokens.length;
    }
    return nodes;
  }

  function select(index, focus = true) {
    positions.forEach((part) => { part.button.removeAttribute("aria-current"); part.button.tabIndex = -1; });
    const part = positions[index];
    part.button.setAttribute("aria-current", "true");
    part.button.tabIndex = 0;
    if (focus) part.button.focus({ preventScroll: false });
    element("details").replaceChildren(...details(part));
  }

  function details(part) {
    const record = part.record;
    const gold = record.g < 0 ? null : text(record.g);
    const here = view();
    const winner = record.w < 0 ? "no fused distribution" : `chosen: ${[here.target, ...here.sources][record.w]}`;
    const nodes = [
      make("h3", { textContent: `After “${visible(part.token)}”: position ${part.index} of segment ${part.segment}` }),
      make("p", { className: "soft", textContent: `${gold === null ? "the segment ends here" : `gold next token: “${visible(gold)}”${record.x ? ", not trained on" : ""}`} · ${winner}` }),
      costs(record, here),
    ];
    const lists = [list(`${here.target}, its own`, record.t, null, gold, 0)];
    here.sources.forEach((name, index) => {
      const source = record.s[index];
      lists.push(list(`${name}, its own`, source.k, null, null, index + 1));
      lists.push(list(`${name}, ${source.o}`, source.r, source.z, gold, index + 1));
    });
    lists.push(list("fused", record.f, record.z, gold, record.w));
    nodes.push(make("div", { className: "lists" }, lists));
    here.sources.forEach((name, index) => nodes.push(...pairing(name, here.target, part, record.s[index])));
    return nodes;
  }

  function costs(record, here) {
    const names = [here.target, ...here.sources];
    const known = record.c.map(([cost, weight], index) => (cost === null ? null : `${names[index]} ${cost} (weight ${weight})`));
    return make("p", { className: "soft", textContent: `cross-entropy here: ${known.filter(Boolean).join(", ") || "not judged over a larger span"}` });
  }

  function list(title, flat, tail, gold, model) {
    const rows = [];
    for (let at = 0; at < flat.length; at += 2) {
      const row = make("div", { className: "entry" }, [make("span", { textContent: visible(text(flat[at])) }), make("span", { textContent: percent(flat[at + 1]) })]);
      if (gold !== null && text(flat[at]) === gold) row.classList.add("gold");
      row.style.setProperty("--share", flat[at + 1] / data.unit);
      row.style.setProperty("--mark", mark(model));
      rows.push(row);
    }
    if (!rows.length) rows.push(make("div", { className: "soft", textContent: "none" }));
    if (tail) rows.push(make("div", { className: "entry soft" }, [make("span", { textContent: "(the rest)" }), make("span", { textContent: percent(tail) })]));
    return make("section", {}, [make("h3", { textContent: `${title}, %` }), ...rows]);
  }

  function pairing(name, target, part, source) {
    const [start, tokens] = source.p;
    const paired = start < 0 ? "nothing" : `${tokens.map((token) => `“${visible(text(token))}”`).join(" ")} (from position ${start})`;
    const unlike = "n" in source ? `conditioned on “${visible(text(source.n))}”, the rest of the candidates is moved` : "contexts differ";
    const contexts = source.e ? "contexts agree" : unlike;
    const nodes = [
      make("h3", { textContent: `Pairing and plan: ${name} to ${target}` }),
      make("p", { className: "pairing soft", textContent: `“${visible(part.token)}” is paired with ${paired}; ${contexts}; outcome: ${source.o}` }),
    ];
    if (source.m) nodes.push(plan(name, target, source));
    return nodes;
  }

  function plan(name, target, source) {
    const most = Math.max(1, ...source.m.flat());
    const head = make("tr", {}, [make("th"), ...source.u.map((token) => make("th", { scope: "col", textContent: visible(text(token)) }))]);
    const rows = source.m.map((masses, row) => make("tr", {}, [
      make("th", { scope: "row", textContent: visible(text(source.k[2 * row])) }),
      ...masses.map((mass, column) => {
        const cell = make("td", { textContent: mass ? percent(mass) : "", title: `${visible(text(source.k[2 * row]))} to ${visible(text(source.u[column]))}: ${percent(mass)} %` });
        if (mass) cell.style.background = `rgba(var(--heat), ${(0.08 + 0.6 * Math.sqrt(mass / most)).toFixed(3)})`;
        return cell;
      }),
    ]));
    const caption = make("caption", { textContent: `transport plan, % of mass: ${name} down, ${target} across` });
    return make("div", { className: "wide" }, [make("table", { className: "plan" }, [caption, make("thead", {}, [head]), make("tbody", {}, rows)])]);
  }

  function move(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -positions.length, End: positions.length };
    if (!(event.key in steps) || !positions.length) return;
    event.preventDefault();
    const now = positions.findIndex((part) => part.button.hasAttribute("aria-current"));
    select(Math.min(Math.max(now + steps[event.key], 0), positions.length - 1));
  }

  if (!data.views.length) return;
  element("view").replaceChildren(...data.views.map((part, index) => make("option", { value: index, textContent: part.name })));
  element("view").addEventListener("change", () => { fillDocuments(); showDocument(); });
  element("doc").addEventListener("change", showDocument);
  element("colour").addEventListener("change", (event) => element("document").classList.toggle("by-token", event.target.value === "token"));
  element("document").addEventListener("keydown", move);
  fillDocuments();
  showDocument();
})();
