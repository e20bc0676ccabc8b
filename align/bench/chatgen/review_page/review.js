// The state of the page, its requests, and its keys.

import { chat, editedTexts, el, opinions, statistics, target, verdict } from "/parts.js";

const REST_MS = 150; // after a row appears: a key pressed twice must not decide on a row that nobody has seen
const $ = (id) => document.getElementById(id);
const now = { reviewer: "", setup: null, view: "start", row: null, mine: null, conflict: null, seconds: 0, since: null };
let busy = true;

class TokenNeeded extends Error {}

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server can't be reached, nothing was stored. Try again.");
  }
  const value = await answer.json().catch(() => ({}));
  if (answer.status === 401) throw new TokenNeeded(value.error);
  if (!answer.ok) throw new Error(`Not done: ${value.error || answer.statusText}`);
  return value;
}

const query = (path, values) => ask(`${path}?${new URLSearchParams(values)}`);

async function act(work) {
  if (busy) return;
  setBusy(true);
  say("");
  try {
    await work();
  } catch (error) {
    if (error instanceof TokenNeeded) askName(error.message);
    else say(error.message, true);
  }
  setTimeout(() => setBusy(false), REST_MS);
}

function setBusy(value) {
  busy = value;
  document.body.dataset.busy = String(value);
}

function say(text, isError = false) {
  $("message").textContent = text;
  $("message").className = isError ? "error" : "";
}

// Time spent on a row, while the page can be seen.

function restart() {
  now.seconds = 0;
  now.since = document.hidden ? null : performance.now();
}

function spent() {
  return now.seconds + (now.since === null ? 0 : (performance.now() - now.since) / 1000);
}

document.addEventListener("visibilitychange", () => {
  now.seconds = spent();
  now.since = document.hidden ? null : performance.now();
});

// A row

function show(answer, state = "") {
  if (answer.progress) showProgress(answer.progress);
  Object.assign(now, { row: answer.row, mine: answer.mine || null, conflict: answer.conflict || null });
  now.view = now.row ? "row" : "done";
  $("state").textContent = state;
  if (!now.row) showDone(answer.progress);
  else $("view").replaceChildren(...pieces());
  $("view").className = now.view;
  $("view").scrollTop = 0;
  showKeys();
  restart();
  ($("chat") || $("view")).focus();
}

const pieces = () => [...opinions(now.row, now.conflict, takeOpinion), chat(now.row, now.mine), target(now.row)];

function showDone(progress) {
  const left = progress.total - progress.complete;
  const text = left
    ? `Nothing for you now: of ${left} rows that are left, you have seen each, or others look at it.`
    : "Every row is done. Thank you!";
  const conflicts = progress.conflicts ? `Reviewers disagree on ${progress.conflicts}; the key c shows them.` : "";
  $("view").replaceChildren(el("section", { id: "chat", tabindex: "-1" }, el("h2", {}, text), el("p", {}, conflicts)));
}

function showProgress(progress) {
  $("bar").max = progress.total;
  $("bar").value = progress.complete;
  $("progress").textContent = `${progress.complete} of ${progress.total}, yours ${progress.mine}`;
  now.conflicts = progress.conflicts;
}

// Decisions

const next = async () => show(await ask("/next", { reviewer: now.reviewer }));

async function decide(choice) {
  const settles = now.conflict !== null;
  const { row } = now;
  const body = { reviewer: now.reviewer, row: row.id, content: row.content, settles, ...choice };
  body.seconds = Math.min(86400, Math.round(spent() * 10) / 10);
  const answer = await ask("/decide", body);
  showProgress(answer.progress);
  if (settles && now.conflicts) await showConflicts();
  else await next();
  say(`${settles ? "Settled" : "Stored"}: ${verdict(answer.decision)}. u takes it back.`);
}

function takeOpinion(number) {
  const decision = now.conflict && now.conflict.opinions[number];
  if (!decision) return;
  const choice = { verdict: decision.verdict };
  if (decision.reason) choice.reason = decision.reason;
  if (decision.texts) choice.texts = decision.texts;
  act(() => decide(choice));
}

const keep = () => act(() => decide({ verdict: "keep" }));

function drop() {
  if (!busy) $("reason-dialog").showModal();
}

function dropFor(number) {
  const reason = now.setup.reasons[number];
  if (!reason) return;
  $("reason-dialog").close();
  act(() => decide({ verdict: "drop", reason: reason.name }));
}

function edit() {
  if (busy) return;
  const known = now.mine || (now.conflict && now.conflict.opinions.find((decision) => decision.texts));
  now.view = "edit";
  $("chat").replaceWith(chat(now.row, now.mine, (known && known.texts) || [], now.setup.max_text_chars));
  showKeys();
  const first = document.querySelector("textarea");
  if (first) first.focus();
  else stopEditing("This chat has no text of the user.");
}

function stopEditing(text = "Not changed.") {
  now.view = "row";
  $("chat").replaceWith(chat(now.row, now.mine));
  showKeys();
  $("chat").focus();
  say(text);
}

function saveEdit() {
  const areas = [...document.querySelectorAll("textarea")];
  const texts = editedTexts(areas);
  if (texts.every((text, number) => text === areas[number].original)) return say("Nothing is changed yet.");
  return act(() => decide({ verdict: "edit", texts }));
}

const undo = () =>
  act(async () => {
    const answer = await ask("/undo", { reviewer: now.reviewer });
    if (!answer.row) return say("There is nothing to take back.");
    const conflict = answer.mine.settles ? (await query("/row", { row: answer.row.id })).conflict : null;
    const undone = verdict(answer.mine);
    show({ ...answer, mine: null, conflict }, "taken back");
    say(`Taken back: ${undone}. Decide again.`);
  });

const look = (step) =>
  act(async () => {
    const values = { reviewer: now.reviewer };
    if (now.mine) values[step < 0 ? "before" : "after"] = now.mine.number;
    else if (step > 0) return say("This is the newest row.");
    const answer = await query("/decided", values);
    if (answer.row) show(answer, "looking back");
    else if (step < 0) say(now.mine ? "This was your first one." : "You have decided nothing yet.");
    else await next();
  });

// Conflicts and statistics

async function showConflicts() {
  const { conflicts } = await ask("/conflicts");
  now.view = "conflicts";
  $("state").textContent = "";
  const items = conflicts.map((conflict) =>
    el(
      "button",
      { type: "button", class: "conflict", onclick: () => act(() => openConflict(conflict.row)) },
      el("span", { class: "text" }, conflict.prompt),
      el("span", { class: "quiet" }, conflict.opinions.map((one) => `${one.reviewer}: ${verdict(one)}`).join(" · ")),
      el("span", { class: "tag" }, conflict.settlement ? `settled: ${verdict(conflict.settlement)}` : "open"),
    ),
  );
  const title = items.length ? "Reviewers disagree on these" : "Reviewers agree on everything so far";
  $("view").replaceChildren(el("section", { id: "chat", tabindex: "-1" }, el("h2", {}, title), ...items));
  $("view").className = now.view;
  showKeys();
  (document.querySelector("button.conflict") || $("chat")).focus();
}

async function openConflict(row) {
  show(await query("/row", { row }), "conflict");
}

async function showStatistics() {
  const all = await ask("/statistics");
  now.view = "statistics";
  $("state").textContent = "";
  $("view").replaceChildren(el("section", { id: "chat", tabindex: "-1" }, ...statistics(all)));
  $("view").className = now.view;
  showKeys();
  $("chat").focus();
}

// Keys

const HELP = [
  ["k", "keep the chat", "Keep", ["row"], keep],
  ["d", "drop it; then the key of a reason", "Drop", ["row"], drop],
  ["e", "edit what the user says; Ctrl+Enter stores it, Esc does not", "Edit", ["row"], edit],
  ["u", "take your last decision back", "Undo", ["row", "done", "conflicts"], undo],
  ["ArrowLeft", "look back at what you decided; k, d and e decide anew", "Back", ["row", "done"], () => look(-1)],
  ["ArrowRight", "look forward again", "Forward", ["row"], () => look(1)],
  ["c", "what reviewers disagree on; ↑, ↓, Enter", "Conflicts", ["row", "done", "conflicts", "statistics"],
    () => act(showConflicts)],
  ["s", "statistics", "Statistics", ["row", "done", "conflicts", "statistics"], () => act(showStatistics)],
  ["Escape", "back to your row", "Your row", ["conflicts", "statistics", "row"], () => atOwnRow() || act(next)],
  ["Enter", "look whether there is a row for you", "Look again", ["done"], () => act(next)],
  ["n", "somebody else reviews", null, ["row", "done", "conflicts", "statistics"], () => askName("")],
  ["?", "this help", "Help", ["row", "done", "conflicts", "statistics"], () => $("help-dialog").showModal()],
];
const atOwnRow = () => now.view === "row" && !now.conflict && !now.mine;
const NAMES = { ArrowLeft: "←", ArrowRight: "→", Escape: "Esc" };

function showKeys() {
  const keys = HELP.filter(([key, , label, views]) =>
    label && views.includes(now.view) && !(key === "Escape" && atOwnRow())).map(([key, help, label, , work]) =>
    el("button", { type: "button", class: key, title: help, onclick: () => work() },
      el("kbd", {}, NAMES[key] || key), ` ${label}`));
  if (now.view === "edit") {
    keys.push(el("button", { type: "button", onclick: saveEdit }, el("kbd", {}, "Ctrl+Enter"), " Store the edit"));
    keys.push(el("button", { type: "button", onclick: () => stopEditing() }, el("kbd", {}, "Esc"), " Leave it as it was"));
  }
  $("keys").replaceChildren(...keys);
}

function moveFocus(step) {
  const items = [...document.querySelectorAll("button.conflict")];
  const next = items[items.indexOf(document.activeElement) + step];
  if (next) next.focus();
}

document.addEventListener("keydown", (event) => {
  const { key } = event;
  if ($("reason-dialog").open && /^[1-9]$/.test(key)) return dropFor(Number(key) - 1);
  if (document.querySelector("dialog[open]") || now.view === "start") return;
  if (now.view === "edit") {
    if (key === "Enter" && (event.ctrlKey || event.metaKey)) saveEdit();
    if (key === "Escape" && !busy) stopEditing();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || (event.repeat && !key.startsWith("Arrow"))) return;
  if (key === "Enter" && document.activeElement.matches("button")) return; // it is pressed
  if (now.view === "conflicts" && (key === "ArrowDown" || key === "ArrowUp")) {
    event.preventDefault();
    return moveFocus(key === "ArrowDown" ? 1 : -1);
  }
  if (now.view === "row" && now.conflict && /^[1-9]$/.test(key)) return takeOpinion(Number(key) - 1);
  const found = HELP.find(([name, , , views]) => name === key && views.includes(now.view));
  if (!found) return;
  event.preventDefault();
  found[4]();
});

// The start

function askName(error) {
  $("name-input").value = now.reviewer;
  $("token-row").hidden = !error;
  $("name-error").textContent = error;
  if (!$("name-dialog").open) $("name-dialog").showModal();
  $(error && now.reviewer ? "token-input" : "name-input").focus();
}

async function begin() {
  setBusy(true);
  const reviewer = $("name-input").value.trim().normalize("NFC");
  try {
    if ($("token-input").value) await ask("/session", { token: $("token-input").value });
    now.setup = await ask("/setup");
    const answer = await ask("/next", { reviewer });
    localStorage.setItem("t2i-align-reviewer", reviewer);
    Object.assign(now, { reviewer });
    $("reviewer").textContent = reviewer;
    $("reasons").replaceChildren(...now.setup.reasons.map((reason, number) =>
      el("button", { type: "button", onclick: () => dropFor(number) }, el("kbd", {}, String(number + 1)),
        el("strong", {}, ` ${reason.name} `), el("span", { class: "quiet" }, reason.help))));
    $("name-dialog").close();
    show(answer);
  } catch (error) {
    $("token-row").hidden = !(error instanceof TokenNeeded);
    now.reviewer = reviewer;
    $("name-error").textContent = error.message;
  }
  setTimeout(() => setBusy(false), REST_MS);
}

$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  begin();
});
$("name-dialog").addEventListener("cancel", (event) => {
  if (!now.setup) event.preventDefault(); // nothing to go back to
});
$("reviewer").addEventListener("click", () => askName(""));
$("help").replaceChildren(...HELP.flatMap(([key, help]) =>
  [el("dt", {}, el("kbd", {}, NAMES[key] || key)), el("dd", {}, help)]));
now.reviewer = localStorage.getItem("t2i-align-reviewer") || "";
askName("");
