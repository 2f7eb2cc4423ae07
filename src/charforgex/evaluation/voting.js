"use strict";
(() => {
  const study = JSON.parse(document.getElementById("study").textContent);
  const element = (id) => document.getElementById(id);
  const SMALL = 129; // pixels, below which pictures are shown as the squares that they are
  const sharpen = ({ target }) => target.classList.toggle("small", Math.max(target.naturalWidth, target.naturalHeight) < SMALL);
  const kept = (rater) => `charforgex-votes/${study.id}/${rater}`;
  let rater = "";
  let votes = []; // {pair, choice, milliseconds}, in the order of study.pairs
  let since = null; // when both pictures of the pair were seen; null while they are not

  function load(name) {
    try {
      const found = JSON.parse(localStorage.getItem(kept(name)) || "[]");
      const fits = Array.isArray(found) && found.length <= study.pairs.length;
      return fits && found.every((vote, i) => vote.pair === study.pairs[i].id) ? found : [];
    } catch {
      return [];
    }
  }

  function keep() {
    try {
      localStorage.setItem(kept(rater), JSON.stringify(votes));
      localStorage.setItem("charforgex-rater", rater);
    } catch {
      element("lost").hidden = false;
    }
  }

  function open(name) {
    for (const id of ["start", "vote", "end"]) element(id).hidden = id !== name;
  }

  async function show() {
    const pair = study.pairs[votes.length];
    since = null;
    if (!pair) {
      finish();
      return;
    }
    open("vote");
    for (const id of ["left", "right", "tie"]) element(id).disabled = true;
    element("undo").disabled = !votes.length;
    element("place").textContent = `Pair ${votes.length + 1} of ${study.pairs.length}`;
    element("progress").value = votes.length / study.pairs.length;
    element("said").hidden = !pair.prompt;
    element("prompt").textContent = pair.prompt;
    const sides = ["left", "right"].map((side) => {
      const picture = element(`${side}-picture`);
      picture.src = study.pictures[pair[side]];
      return picture.decode().catch(() => {}); // a picture that is missing must not end the vote
    });
    await Promise.all(sides);
    if (study.pairs[votes.length] !== pair || element("vote").hidden) return;
    for (const id of ["left", "right", "tie"]) element(id).disabled = false;
    since = performance.now();
    const next = study.pairs[votes.length + 1];
    for (const side of next ? ["left", "right"] : []) new Image().src = study.pictures[next[side]];
  }

  function choose(choice) {
    if (since === null || element("vote").hidden) return;
    votes.push({ pair: study.pairs[votes.length].id, choice, milliseconds: Math.round(performance.now() - since) });
    keep();
    element("question").focus({ preventScroll: true }); // so that space is "no difference" again and not the button of before
    show();
  }

  function undo() {
    if (!votes.length || !element("start").hidden) return;
    votes.pop();
    keep();
    show();
  }

  function json() {
    const saved = new Date().toISOString();
    return `${JSON.stringify({ format: "charforgex-votes-1", study: study.id, rater, saved, votes }, null, 1)}\n`;
  }

  function save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([json()], { type: "application/json" }));
    link.download = `votes-${rater.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "rater"}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function finish() {
    open("end");
    element("thanks").textContent = `Thank you, ${rater}. Those were all ${study.pairs.length} pairs.`;
    element("json").value = json();
    element("copied").textContent = "";
    element("thanks").focus({ preventScroll: true });
  }

  async function copy() {
    try {
      await navigator.clipboard.writeText(element("json").value);
    } catch {
      element("json").select();
      document.execCommand("copy"); // pages that are opened as files may not have the clipboard
    }
    element("copied").textContent = "Copied.";
  }

  function known() {
    const count = load(element("rater").value.trim()).length;
    element("known").textContent = count ? `${count} of ${study.pairs.length} votes of this name are kept here: go on with them.` : "";
  }

  element("count").textContent = study.pairs.length;
  for (const name of study.references) {
    const picture = document.createElement("img");
    picture.addEventListener("load", sharpen);
    picture.src = study.pictures[name];
    picture.alt = "the character";
    element("references").append(picture);
  }
  element("references").hidden = !study.references.length;
  element("form").addEventListener("submit", (event) => {
    event.preventDefault();
    rater = element("rater").value.trim();
    if (!rater) return;
    votes = load(rater);
    keep();
    element("rater").blur();
    show();
  });
  element("rater").addEventListener("input", known);
  for (const side of ["left", "right"]) element(`${side}-picture`).addEventListener("load", sharpen);
  for (const id of ["left", "right", "tie"]) element(id).addEventListener("click", () => choose(id));
  for (const id of ["undo", "back"]) element(id).addEventListener("click", undo);
  for (const id of ["save", "pause"]) element(id).addEventListener("click", save);
  element("copy").addEventListener("click", copy);
  const keys = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", 0: "tie", " ": "tie" };
  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || target.matches("input, textarea")) return;
    if (event.key === "Backspace") {
      event.preventDefault();
      undo();
    } else if (event.key in keys && !element("vote").hidden) {
      if (event.key === " " && target.matches("button")) return; // who has gone to a button means that button
      event.preventDefault();
      choose(keys[event.key]);
    }
  });
  try {
    element("rater").value = localStorage.getItem("charforgex-rater") || "";
  } catch {
    element("lost").hidden = false;
  }
  known();
  open("start");
  element("rater").focus();
})();
