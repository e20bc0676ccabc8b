// Pieces of the page. Everything in a row was written by strangers: it gets here as text, and stays text.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null)); // texts become text nodes
  return node;
}

export function verdict(decision) {
  return decision.reason ? `${decision.verdict}, ${decision.reason}` : decision.verdict;
}

// The chat; with drafts, texts of the user can be edited: what a draft lacks is as it was.
export function chat(row, mine, drafts = null, maxChars = null) {
  let number = 0;
  const messages = row.messages.map((message) => {
    const pieces = message.parts.map((part) => {
      if ("image" in part) return picture(row, part);
      if (message.role !== "user" || drafts === null) return el("p", { class: "text" }, part.text);
      number += 1;
      const area = el("textarea", { "aria-label": `Text ${number} of the user`, maxlength: maxChars });
      area.original = part.text;
      area.value = drafts[number - 1] ?? part.text;
      area.rows = Math.min(16, Math.max(3, Math.ceil(area.value.length / 60) + area.value.split("\n").length - 1));
      return area;
    });
    const kind = message.role === "user" ? "user" : "other";
    return el("article", { class: `message ${kind}` }, el("h3", {}, message.role), ...pieces);
  });
  return el(
    "section",
    { id: "chat", tabindex: "-1", "aria-label": "Chat" },
    el("h2", {}, row.role ? `Chat of: ${row.role}` : "Chat"),
    mine && el("div", { class: "mine" }, `You decided: ${verdict(mine)}`, ...edits(row, mine)),
    ...messages,
  );
}

// What the user says now: where nothing was changed, the text itself, since areas change the ends of lines.
export function editedTexts(areas) {
  return areas.map((area) => (area.value === area.original.replace(/\r\n?/g, "\n") ? area.original : area.value));
}

export function target(row) {
  const facts = row.facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  const turns = row.turns.slice(0, -1).map((turn) => el("li", { class: "text" }, turn)); // the last one is the prompt
  return el(
    "section",
    { id: "target", tabindex: "-1", "aria-label": "Target" },
    el("h2", {}, "Target"),
    el("h3", {}, "Prompt"),
    el("p", { class: "text prompt" }, row.prompt || "(none)"),
    turns.length ? el("h3", {}, "Wanted before, message by message") : null,
    turns.length ? el("ol", {}, ...turns) : null,
    el("h3", {}, "Negative prompt"),
    el("p", { class: "text" }, row.negative_prompt || "(none)"),
    el("dl", { class: "facts" }, ...facts),
    el("p", { class: "quiet" }, row.id),
  );
}

// What reviewers think of a row that they disagree on, as buttons; nothing where there is no conflict.
export function opinions(row, conflict, take) {
  if (!conflict) return [];
  const cards = conflict.opinions.map((decision, number) =>
    el(
      "button",
      { type: "button", class: `opinion ${decision.verdict}`, onclick: () => take(number) },
      el("kbd", {}, String(number + 1)),
      el("strong", {}, ` ${decision.reviewer}: `),
      verdict(decision),
      ...edits(row, decision),
    ),
  );
  const last = conflict.settlement && `${conflict.settlement.reviewer} settled it: ${verdict(conflict.settlement)}`;
  const head = el("h2", {}, "Reviewers disagree");
  return [el("section", { id: "opinions", "aria-label": "Opinions" }, head, last && el("p", { class: "mine" }, last), ...cards)];
}

export function statistics({ states, settled, reasons, reviewers, agreement }) {
  const people = reviewers.map((p) => [p.name, p.decisions, p.keep, p.drop, p.edit, rounded(p.median_seconds, 1)]);
  const pairs = agreement.pairs.map((pair) => [
    `${pair.first} and ${pair.second}`,
    pair.units,
    rounded(pair.percent, 1),
    rounded(pair.kappa, 3),
  ]);
  const all = [agreement.units, rounded(agreement.percent, 1), rounded(agreement.krippendorffs_alpha, 3)];
  return [
    el("h2", {}, "Rows"),
    table(["Outcome", "Rows"], [...Object.entries(states), ["settled", settled]]),
    table(["Dropped, because", "Rows"], Object.entries(reasons)),
    el("h2", {}, "Reviewers"),
    table(["Name", "Decisions", "Keep", "Drop", "Edit", "Median seconds"], people),
    el("h2", {}, "Agreement on keep, drop and edit"),
    table(["Rows of several", "Percent", "Krippendorff's alpha"], [all]),
    table(["Pair", "Rows of both", "Percent", "Cohen's kappa"], pairs),
  ];
}

function picture(row, part) {
  if (!part.served) return el("p", { class: "address" }, `Picture: ${part.address}`);
  const address = `/image?${new URLSearchParams({ row: row.id, index: part.image })}`;
  const image = el("img", { src: address, alt: `Picture ${part.image + 1} of the chat` });
  image.addEventListener("error", () =>
    image.replaceWith(el("p", { class: "address" }, `This picture can't be shown: ${part.address}`)),
  );
  return image;
}

function edits(row, decision) {
  const users = row.messages.filter((message) => message.role === "user").flatMap((message) => message.parts);
  const originals = users.filter((part) => "text" in part).map((part) => part.text);
  return (decision.texts || []).map((text, number) =>
    el("p", { class: text === originals[number] ? "text edited same" : "text edited" }, text),
  );
}

function table(heads, rows) {
  const cells = (kind, values) => el("tr", {}, ...values.map((value) => el(kind, {}, String(value ?? "–"))));
  return el("table", {}, el("thead", {}, cells("th", heads)), el("tbody", {}, ...rows.map((row) => cells("td", row))));
}

function rounded(value, digits) {
  return value === null ? null : value.toFixed(digits);
}
