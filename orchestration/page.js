// Sorts a table by a column when its header is clicked (or chosen by keyboard): numbers by value, words by letter.
// A body of a table is one piece: what stands below an arm moves with it.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (body, column) => {
    const cell = body.rows[0].cells[column];
    const text = cell?.dataset.value ?? cell?.textContent.trim() ?? "";
    const value = text === "" || text === "–" ? NaN : Number(text);
    return { text, value };
  };
  const compare = (a, b) => {
    const numbers = [a, b].map((each) => !Number.isNaN(each.value));
    if (numbers[0] && numbers[1]) return a.value - b.value;
    if (numbers[0] !== numbers[1]) return numbers[0] ? -1 : 1;
    return a.text.localeCompare(b.text);
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const bodies = [...table.tBodies].sort((a, b) => compare(key(a, column), key(b, column)));
      table.append(...(down ? bodies.reverse() : bodies));
    });
  });
}
