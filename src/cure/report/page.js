"use strict";
(() => {
  const root = document.documentElement;
  const announce = document.getElementById("announce");

  // Light and dark: the system's, unless the reader says otherwise.
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remember = (value) => {
    try {
      if (value) localStorage.setItem("cure-theme", value);
      return localStorage.getItem("cure-theme");
    } catch {
      return null; // Some browsers keep nothing for a page from disk.
    }
  };
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Change to light colours" : "Change to dark colours");
  };
  const kept = remember();
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    remember(root.dataset.theme);
    label();
  });
  system.addEventListener("change", label);
  label();

  // On a phone the verdict comes before a long list.
  if (innerWidth < 700) document.getElementById("contents").open = false;

  // Tables that sort.
  const key = (row, column) => {
    const cell = row.cells[column];
    const order = cell.dataset.order ?? cell.textContent.trim();
    const number = Number(order.replace("\u2212", "-").replace(/,/g, ""));
    return order !== "" && !Number.isNaN(number) ? number : order;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b, undefined, { numeric: true });
  };
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const sort = document.createElement("button");
      sort.type = "button";
      sort.className = "sort";
      sort.append(...head.childNodes);
      head.append(sort);
      head.setAttribute("aria-sort", "none");
      sort.addEventListener("click", () => {
        // Numbers begin with the largest, words with the first.
        const first = head.classList.contains("number") ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const way = head.getAttribute("aria-sort") === first ? other : first;
        heads.forEach((each) => each.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", way);
        const sign = way === "ascending" ? 1 : -1;
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row, index) => [key(row, column), index, row]);
        rows.sort((a, b) => sign * compare(a[0], b[0]) || a[1] - b[1]);
        body.append(...rows.map((row) => row[2]));
        announce.textContent = `Sorted by ${sort.textContent.trim()}, ${way}`;
      });
    });
  }

  // A link to something folded away unfolds it; print unfolds everything.
  const unfold = () => {
    let target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    for (; target; target = target.parentElement) if (target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();
  addEventListener("beforeprint", () => {
    for (const folded of document.querySelectorAll("details")) folded.open = true;
  });

  // Where the reader is, in the contents.
  const links = new Map();
  for (const link of document.querySelectorAll("nav a")) {
    const section = document.getElementById(link.hash.slice(1));
    if (section?.tagName === "SECTION") links.set(section, link);
  }
  const seen = new Set();
  const observer = new IntersectionObserver(
    (changes) => {
      for (const change of changes) {
        if (change.isIntersecting) seen.add(change.target);
        else seen.delete(change.target);
      }
      const now = [...links.keys()].find((section) => seen.has(section));
      for (const [section, link] of links) {
        if (section === now) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    },
    { rootMargin: "-15% 0px -60% 0px" },
  );
  for (const section of links.keys()) observer.observe(section);
})();
