// What the page does in the browser by itself: it hands clicks and forms to the server, and keeps focus where it was.
"use strict";
(() => {
  const tell = (name, said) => window.socket && window.emitEvent && emitEvent(name, said);

  // what is clicked or sent: an element with data-act says what, its other data- attributes and its form with which values
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-act]");
    if (!button || button.type === "submit") return;
    const form = button.closest("form");
    tell("act", { ...(form ? said(form) : {}), ...button.dataset });
  });
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (!form.dataset.act) return;
    event.preventDefault();
    tell("act", { ...said(form), ...form.dataset, ...(event.submitter ? event.submitter.dataset : {}) });
  });
  document.addEventListener("change", (event) => {
    const form = event.target.closest("form[data-changes]");
    if (form) tell("act", { ...said(form), ...form.dataset, act: form.dataset.changes });
  });
  let typing = 0;
  document.addEventListener("input", (event) => {
    const field = event.target;
    if (field.type === "range") share(field);
    if (!field.dataset.filters) return;
    clearTimeout(typing);
    typing = setTimeout(() => tell("act", { act: field.dataset.filters, text: field.value }), 200);
  });
  function said(form) {
    const found = {};
    for (const [name, value] of new FormData(form)) (found[name] ??= []).push(value);
    return { values: found };
  }

  // sliders of shares always make a hundred: the others give way in proportion
  function share(moved) {
    const group = moved.closest("[data-shares]");
    if (group) {
      const others = [...group.querySelectorAll("input[type=range]")].filter((one) => one !== moved);
      const left = 100 - Number(moved.value);
      const sum = others.reduce((total, one) => total + Number(one.value), 0);
      let given = 0;
      others.forEach((one, place) => {
        const part = place === others.length - 1 ? left - given : Math.round(sum ? (left * one.value) / sum : left / others.length);
        one.value = part;
        given += part;
      });
    }
    shown(group || moved.parentElement);
  }
  function shown(group) {
    for (const one of group.querySelectorAll("input[type=range]")) {
      const told = one.parentElement.querySelector("output");
      if (told) told.textContent = "shares" in group.dataset ? `${one.value} %` : Number(one.value).toFixed(2);
    }
  }

  // what somebody typed in, or unfolded, stays so when it is drawn anew, until it is sent; and so does the focus
  let held = null;
  const typed = new Map(), unfolded = new Map();
  const chosen = (field) => (field.type === "checkbox" ? field.checked : field.value);
  document.addEventListener("input", (event) => {
    if (event.target.dataset.key) typed.set(event.target.dataset.key, chosen(event.target));
    const group = event.target.closest("[data-shares]");
    for (const one of group ? group.querySelectorAll("input[type=range]") : []) typed.set(one.dataset.key, one.value);
  });
  document.addEventListener("submit", (event) => {
    for (const one of event.target.elements) typed.delete(one.dataset.key);
  });
  document.addEventListener("toggle", (event) => {
    if (event.target.dataset && event.target.dataset.key) unfolded.set(event.target.dataset.key, event.target.open);
  }, true);
  const keyed = (key) => document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  function keep() {
    for (const [key, value] of typed) {
      const field = keyed(key);
      if (!field || chosen(field) === value) continue;
      if (field.type === "checkbox") field.checked = value;
      else if (field.tagName !== "SELECT" || [...field.options].some((one) => one.value === value)) field.value = value;
      if (field.type === "range") shown(field.closest("[data-shares]") || field.parentElement);
    }
    for (const [key, open] of unfolded) {
      const one = keyed(key);
      if (one && one.open !== open) one.open = open;
    }
  }
  document.addEventListener("focusin", (event) => (held = event.target.dataset ? event.target.dataset.key : null));
  document.addEventListener("pointerdown", () => (held = null), true);
  new MutationObserver(() => {
    keep();
    if (!held || (document.activeElement && document.activeElement !== document.body)) return;
    const again = keyed(held);
    if (again) again.focus({ preventScroll: true });
  }).observe(document.documentElement, { childList: true, subtree: true });

  // keys
  const goes = { r: "", t: "traffic", p: "playground", c: "compare", l: "lineage", e: "events" };
  let began = 0;
  document.addEventListener("keydown", (event) => {
    const field = event.target.closest("input, textarea, select, [contenteditable]");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && field && field.form) {
      event.preventDefault();
      field.form.requestSubmit();
    }
    if (event.ctrlKey || event.metaKey || event.altKey || (field && field.type !== "range")) return;
    const key = event.key.toLowerCase();
    if (performance.now() - began < 1500 && key in goes) location.assign(`/ui/${goes[key]}`);
    else if (key === "g") began = performance.now();
    else if (key === "d") lorakitTheme.turn();
    else if (event.key === "?") document.getElementById("keys").showModal();
    else if (event.key === "/") {
      const filter = document.querySelector("[data-filters], textarea");
      if (filter) event.preventDefault(), filter.focus();
    }
  });
  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-theme-turn]")) lorakitTheme.turn();
    if (event.target.closest("[data-keys]")) document.getElementById("keys").showModal();
  });

  document.addEventListener("lorakit-theme", () => tell("theme", { theme: lorakitTheme.now() }));
  document.addEventListener("visibilitychange", () => tell("seen", { seen: !document.hidden }));

  window.lorakit = {
    // a line that says what was done, for a while
    say(text, kind) {
      const place = document.getElementById("said");
      const line = document.createElement("p");
      line.className = kind;
      line.textContent = text;
      place.replaceChildren(line);
      clearTimeout(lorakit.until);
      lorakit.until = setTimeout(() => line.remove(), kind === "wrong" ? 12000 : 5000);
    },
    put(id, text) {
      const place = document.getElementById(id);
      if (place) place.textContent = text;
    },
    // more of an answer
    more(id, text) {
      const place = document.getElementById(id);
      if (!place) return;
      place.append(text);
      place.scrollTop = place.scrollHeight;
    },
  };
})();
