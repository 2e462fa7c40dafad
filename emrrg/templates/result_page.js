"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const studies = [...document.querySelectorAll("article.study")].map((article, place) => ({
    article,
    place,
    entry: document.querySelector(`[data-study="${article.id}"]`),
    text: [".id", ".report"]
      .flatMap((part) => [...article.querySelectorAll(part)])
      .map((element) => element.textContent)
      .join(" ")
      .toLowerCase()
      .replace(/\s+/g, " "),
    scores: article.dataset.scores.split(" ").map(Number),
    has: (what, name) => article.dataset[what].split("|").includes(name),
  }));
  let shown = studies;
  let current = null;

  function matches(study) {
    const data = study.article.dataset;
    const wanted = byId("search").value.toLowerCase().trim().replace(/\s+/g, " ");
    const [kind, finding, status, error] = ["kind", "finding", "status", "error"].map(
      (id) => byId(id).value,
    );
    const where = status ? [status] : ["right", "missed", "invented"];
    if (wanted && !study.text.includes(wanted)) return false;
    if (kind && !data.kinds.split(" ").includes(kind)) return false;
    if (error && !data.errors.split(" ").includes(error)) return false;
    if (finding && !where.some((what) => study.has(what, finding))) return false;
    if (!finding && status && !data[status]) return false;
    return [...document.querySelectorAll("select.group")].every(
      (select) =>
        !select.value ||
        select.value === study.article.getAttribute(`data-group-${select.dataset.column}`),
    );
  }

  function filter() {
    const [score, way] = byId("order").value.split(" ");
    shown = studies.filter(matches);
    if (score) {
      const sign = way === "up" ? 1 : -1;
      shown.sort((a, b) => sign * (a.scores[score] - b.scores[score]) || a.place - b.place);
    }
    for (const study of studies) study.entry.parentElement.hidden = !shown.includes(study);
    byId("list").append(...shown.map((study) => study.entry.parentElement));
    byId("nothing").hidden = shown.length > 0;
    show(shown.includes(current) ? current : shown[0] ?? null);
  }

  function show(study) {
    look(null);
    current = study;
    for (const other of studies) {
      other.article.hidden = other !== study;
      other.entry.setAttribute("aria-current", String(other === study));
    }
    const place = shown.indexOf(study);
    byId("previous").disabled = place <= 0;
    byId("next").disabled = place < 0 || place === shown.length - 1;
    byId("count").textContent = shown.length ? `Study ${place + 1} of ${shown.length}` : "No study";
    if (study) {
      const list = byId("list").parentElement;
      const entry = study.entry;
      if (entry.offsetTop < list.scrollTop) list.scrollTop = entry.offsetTop;
      const below = entry.offsetTop + entry.offsetHeight - list.clientHeight;
      if (below > list.scrollTop) list.scrollTop = below;
    }
  }

  function go(study) {
    if (!study) return;
    show(study);
    history.replaceState(null, "", `#${study.article.id}`);
    if (study.article.getBoundingClientRect().top < 0) study.article.scrollIntoView();
  }

  const step = (by) => go(shown[shown.indexOf(current) + by]);

  function overlay(sentence) {
    if (!current) return;
    for (const map of current.article.querySelectorAll(".map")) {
      map.hidden = !sentence;
      if (sentence) map.src = sentence.dataset.map;
    }
  }

  function pressed() {
    return current?.article.querySelector('.sentence[aria-pressed="true"]') ?? null;
  }

  function look(sentence) {
    pressed()?.setAttribute("aria-pressed", "false");
    sentence?.setAttribute("aria-pressed", "true");
    overlay(sentence);
  }

  function lookOn() {
    const sentences = [...(current?.article.querySelectorAll(".sentence") ?? [])];
    look(sentences[sentences.indexOf(pressed()) + 1] ?? null);
  }

  function enlarge(button) {
    const large = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(large));
  }

  function mark(box, name) {
    document.body.classList.toggle(name, !box.checked);
  }

  function flip(id, name) {
    byId(id).checked = !byId(id).checked;
    mark(byId(id), name);
  }

  const keys = {
    ArrowRight: () => step(1),
    ArrowLeft: () => step(-1),
    j: () => step(1),
    k: () => step(-1),
    Home: () => go(shown[0]),
    End: () => go(shown[shown.length - 1]),
    "/": () => byId("search").focus(),
    a: lookOn,
    f: () => flip("show-findings", "plain-findings"),
    d: () => flip("show-differences", "plain-differences"),
    z: () => current?.article.querySelectorAll(".picture").forEach(enlarge),
    Escape: () => look(null),
    "?": () => byId("help").showModal(),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    const target = event.target;
    if (target.matches("input[type=search], select")) {
      if (event.key === "Escape") target.blur();
      return;
    }
    if (target.matches(".sentence") && (event.key === "Enter" || event.key === " ")) {
      look(target === pressed() ? null : target);
    } else if (keys[event.key] && !(target.matches(".scroll") && event.key.startsWith("Arrow"))) {
      keys[event.key]();
    } else {
      return;
    }
    event.preventDefault();
  });

  byId("cases").addEventListener("click", (event) => {
    const sentence = event.target.closest(".sentence");
    const picture = event.target.closest(".picture");
    if (sentence) look(sentence === pressed() ? null : sentence);
    if (picture) enlarge(picture);
  });
  byId("cases").addEventListener("mouseover", (event) => {
    overlay(event.target.closest(".sentence") ?? pressed());
  });
  byId("cases").addEventListener("mouseleave", () => overlay(pressed()));
  byId("list").addEventListener("click", (event) => {
    const entry = event.target.closest("button");
    go(studies.find((study) => study.entry === entry));
  });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("keys").addEventListener("click", () => byId("help").showModal());
  byId("filters").addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(filter));
  byId("show-findings").addEventListener("change", (e) => mark(e.target, "plain-findings"));
  byId("show-differences").addEventListener("change", (e) => mark(e.target, "plain-differences"));
  window.addEventListener("hashchange", () => {
    const asked = shown.find((study) => `#${study.article.id}` === location.hash);
    if (asked) show(asked);
  });

  root.classList.add("scripts");
  current = studies.find((study) => `#${study.article.id}` === location.hash) ?? null;
  filter();
})();
