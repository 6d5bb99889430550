"use strict";
// Choosing and ordering of pairs, and the slider. Without this script all pairs stand in groups, side by side.
(() => {
  const form = document.getElementById("toolbar");
  if (!form) return;
  const cards = [...document.querySelectorAll("article")].map((element) => ({
    element,
    places: JSON.parse(element.dataset.places),
  }));
  const grid = document.createElement("div");
  grid.className = "cards";
  const groups = document.getElementById("groups");
  groups.replaceChildren(grid);
  form.hidden = false;
  const count = document.getElementById("count");

  const addSlider = (element) => {
    const frames = element.querySelector(".frames");
    const range = document.createElement("input");
    range.type = "range";
    range.min = 0;
    range.max = 100;
    range.value = 50;
    range.setAttribute("aria-label", "Share of the width that shows the base");
    const set = () => {
      frames.style.setProperty("--cut", range.value + "%");
      range.setAttribute("aria-valuetext", `base ${range.value}%, policy ${100 - range.value}%`);
    };
    range.addEventListener("input", set);
    const line = document.createElement("span");
    line.className = "line";
    frames.append(line, range);
    set();
  };
  cards.forEach(({ element }) => addSlider(element));

  const update = () => {
    const { show, scorer, category, view } = form.elements;
    const random = show.value === "random";
    const key = [show.value, random ? "" : scorer.value, category ? category.value : ""].join(".");
    const chosen = cards.filter(({ places }) => key in places).sort((a, b) => a.places[key] - b.places[key]);
    scorer.disabled = random;
    grid.classList.toggle("sliding", view.value === "slider");
    grid.replaceChildren(...chosen.map(({ element }) => element));
    count.textContent = chosen.length === 1 ? "1 pair" : chosen.length ? `${chosen.length} pairs` : "no such pair";
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
})();
