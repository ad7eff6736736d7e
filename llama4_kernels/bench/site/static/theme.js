"use strict";
// Before the page is drawn: the colours that were chosen last, else the system's.
(() => {
  const root = document.documentElement;
  const system = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  let stored = null;
  try {
    stored = localStorage.getItem("theme");
  } catch {
    /* storage may be off */
  }
  root.dataset.theme = stored || system();
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
      try {
        localStorage.setItem("theme", root.dataset.theme);
      } catch {
        /* storage may be off */
      }
      document.dispatchEvent(new Event("themechange"));
    });
    for (const button of document.querySelectorAll("[data-copy]")) {
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(button.dataset.copy);
        button.textContent = "Copied";
      });
    }
  });
})();
