"use strict";

// The table of neurons: sorted, searched, filtered and paged here, a page of rows in the document at a time.
// Tokens and contexts come from models and data: they enter the document as text, never as markup.
(() => {
  const PAGE_SIZE = 50;
  const NO_VALUE = "—";
  const KEYS = ["layer", "role", "expert", "index"];
  // Columns of the table in order; those without data are left out. The rest is in the detail view.
  const COLUMNS = [
    { name: "layer", title: "layer" },
    { name: "role", title: "projection", isText: true },
    { name: "expert", title: "expert" },
    { name: "index", title: "index" },
    { name: "distance", title: "1 − cos" },
    { name: "change", title: "norm of change" },
    { name: "turn", title: "turn" },
    { name: "rank_before", title: "rank before" },
    { name: "rank_after", title: "rank after" },
    { name: "rank_change", title: "rank change" },
    { name: "category", title: "category", isText: true },
    { name: "promoted_before", title: "promoted before", isText: true, isLens: true },
    { name: "promoted_after", title: "promoted after", isText: true, isLens: true },
  ];
  const MEASURES = {
    distance: "1 − cos, base model to warm-up (the score)",
    turn: "1 − cos, before to after training",
    change: "length of the change / length before",
    rank_change: "rank change (positive: fallen)",
    category: "category",
  };
  // Measured on both models: NAME_before, NAME_after.
  const PAIRS = {
    norm: "length",
    utilization: "utilization",
    rank: "rank in its projection",
    peak: "layer whose hidden state it resembles most",
  };
  const LENS = { promoted: "Promoted tokens", suppressed: "Suppressed tokens" };
  const SIDES = { before: "base", after: "trained" };

  const byId = (id) => document.getElementById(id);

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  // Data

  async function unpack(base64) {
    const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function tokensOf(data, name, row) {
    const found = data.lens[name];
    return found ? found[row].map((token) => data.tokens[token]) : [];
  }

  function valueOf(data, column, row) {
    if (column.isLens) return tokensOf(data, column.name, row).map(visible).join("  ");
    const value = data.columns[column.name][row];
    return column.name === "category" && value !== null ? data.categories[value] : value;
  }

  // White space at the ends of a token matters, and control characters would not show at all.
  function visible(token) {
    return token
      .replace(/\n/g, "⏎")
      .replace(/\t/g, "⇥")
      .replace(/\r/g, "␍")
      .replace(/^ /, "␣")
      .replace(/ $/, "␣");
  }

  function shown(value) {
    if (value === null || value === undefined || value === "") return NO_VALUE;
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size < 1e-3 || size >= 1e5 ? value.toExponential(2) : value.toPrecision(4);
  }

  function isPresent(data, column) {
    return column.isLens ? column.name in data.lens : column.name in data.columns;
  }

  // Which rows, in which order

  function searchTexts(data) {
    const lists = Object.keys(data.lens);
    return data.columns.index.map((index, row) => {
      const tokens = lists.flatMap((name) => tokensOf(data, name, row));
      const place = `${data.columns.layer[row]}.${data.columns.role[row]}${expertOf(data, row, ".")}.${index}`;
      return [place, ...tokens].join("\n").toLowerCase();
    });
  }

  function matchingRows(state) {
    const { data, filters } = state;
    const wanted = filters.text.trim().toLowerCase();
    if (wanted && !state.texts) state.texts = searchTexts(data);
    const isWanted = (name, row) => filters[name] === "" || String(data.columns[name][row]) === filters[name];
    return data.columns.index
      .map((_, row) => row)
      .filter((row) => ["layer", "role", "category"].every((name) => isWanted(name, row)))
      .filter((row) => !wanted || state.texts[row].includes(wanted));
  }

  function compare(first, second) {
    return typeof first === "number" ? first - second : String(first).localeCompare(String(second));
  }

  function sortedRows(state, rows) {
    if (!state.sort) return rows;
    const { column, isDescending } = state.sort;
    const keys = new Map(rows.map((row) => [row, valueOf(state.data, column, row)]));
    const isMissing = (row) => [null, undefined, ""].includes(keys.get(row));
    return rows.sort((first, second) => {
      // What is not known comes last in both directions.
      if (isMissing(first) || isMissing(second)) return isMissing(first) - isMissing(second);
      const order = compare(keys.get(first), keys.get(second));
      return isDescending ? -order : order;
    });
  }

  // The table

  function showTable(state) {
    state.rows = sortedRows(state, matchingRows(state));
    state.page = 0;
    showPage(state);
  }

  function showPage(state) {
    const start = state.page * PAGE_SIZE;
    const rows = state.rows.slice(start, start + PAGE_SIZE);
    byId("neuron-table").tBodies[0].replaceChildren(...rows.map((row) => tableRow(state, row)));
    byId("neuron-table").closest(".scroll").scrollTop = 0;
    byId("neuron-status").textContent = status(state, start, rows.length);
    const last = lastPage(state);
    for (const button of document.querySelectorAll("[data-page]")) {
      const isBack = ["first", "previous"].includes(button.dataset.page);
      button.disabled = isBack ? state.page === 0 : state.page === last;
    }
  }

  function status(state, start, count) {
    const total = state.data.columns.index.length;
    if (!count) return `No neuron of ${shown(total)} matches`;
    const range = `${shown(start + 1)}–${shown(start + count)} of ${shown(state.rows.length)}`;
    return state.rows.length < total ? `${range} (${shown(total)} in all)` : range;
  }

  function lastPage(state) {
    return Math.max(0, Math.ceil(state.rows.length / PAGE_SIZE) - 1);
  }

  function turnTo(state, page) {
    const targets = { first: 0, previous: state.page - 1, next: state.page + 1, last: lastPage(state) };
    state.page = targets[page];
    showPage(state);
  }

  function tableRow(state, row) {
    const made = element("tr");
    for (const column of state.columns) {
      if (column.name === "index") {
        made.append(indexCell(state, row));
      } else {
        const kind = [column.isText && "text", column.isLens && "tokens"].filter(Boolean).join(" ");
        made.append(element("td", shown(valueOf(state.data, column, row)), kind));
      }
    }
    made.addEventListener("click", () => {
      // From where the dialog was opened, wherever in the row: there the focus returns.
      made.querySelector(".open").focus({ preventScroll: true });
      openNeuron(state, row);
    });
    return made;
  }

  function indexCell(state, row) {
    const cell = element("th");
    cell.scope = "row";
    const button = element("button", shown(state.data.columns.index[row]), "open");
    button.type = "button";
    button.setAttribute("aria-label", `${button.textContent}: open ${nameOf(state.data, row)}`);
    cell.append(button);
    return cell;
  }

  function nameOf(data, row) {
    const [layer, role, index] = ["layer", "role", "index"].map((key) => data.columns[key][row]);
    const place = layer === null ? "outside the layers" : `layer ${layer}`;
    return `${place}, ${role}${expertOf(data, row, ", expert ")}, neuron ${shown(index)}`;
  }

  // Nothing where a neuron is of no expert.
  function expertOf(data, row, before) {
    const expert = data.columns.expert?.[row] ?? null;
    return expert === null ? "" : `${before}${expert}`;
  }

  function showHeader(state) {
    const cells = state.columns.map((column) => {
      const cell = element("th", undefined, column.isText ? "text" : "");
      cell.scope = "col";
      const button = element("button", column.title);
      button.type = "button";
      button.addEventListener("click", () => sortBy(state, column));
      cell.append(button);
      return cell;
    });
    byId("neuron-table").tHead.rows[0].replaceChildren(...cells);
  }

  function sortBy(state, column) {
    const isSame = state.sort && state.sort.column === column;
    // The largest number is what one looks for first; of words, the first.
    const isDescending = isSame ? !state.sort.isDescending : !column.isText && !KEYS.includes(column.name);
    state.sort = { column, isDescending };
    state.columns.forEach((each, place) => {
      const cell = byId("neuron-table").tHead.rows[0].cells[place];
      if (each === column) cell.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    showTable(state);
  }

  // One neuron

  function openNeuron(state, row) {
    const { data } = state;
    const name = nameOf(data, row);
    byId("neuron-title").textContent = name[0].toUpperCase() + name.slice(1);
    const unit = data.unitRoles.includes(data.columns.role[row])
      ? `${data.columns.layer[row]}.${data.columns.index[row]}`
      : null;
    byId("neuron-details").replaceChildren(
      ...measures(data, row),
      ...lensLists(data, row),
      ...activity(data, unit),
      ...contexts(data, unit),
    );
    byId("neuron-details").scrollTop = 0;
    // The browser gives the focus back to where it was once the dialog closes.
    byId("neuron-dialog").showModal();
  }

  function table(caption, header, rows, className) {
    const made = element("table", undefined, className);
    made.append(element("caption", caption));
    const head = element("tr");
    for (const title of header) {
      const cell = element(title ? "th" : "td", title);
      if (title) cell.scope = "col";
      head.append(cell);
    }
    made.createTHead().append(head);
    const body = made.createTBody();
    for (const [name, ...cells] of rows) {
      const line = element("tr");
      const first = element("th", name);
      first.scope = "row";
      line.append(first, ...cells.map((cell) => (cell instanceof Node ? wrapped(cell) : element("td", cell))));
      body.append(line);
    }
    const scroll = element("div", undefined, "scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", caption);
    scroll.append(made);
    return scroll;
  }

  function wrapped(node) {
    const cell = element("td");
    cell.append(node);
    return cell;
  }

  function measures(data, row) {
    const rows = Object.entries(MEASURES)
      .filter(([name]) => name in data.columns)
      .map(([name, title]) => [title, shown(valueOf(data, { name }, row))]);
    const pairs = Object.entries(PAIRS)
      .filter(([name]) => `${name}_before` in data.columns)
      .map(([name, title]) => [title, ...Object.keys(SIDES).map((side) => shown(data.columns[`${name}_${side}`][row]))]);
    return [
      ...(pairs.length ? [table("Its vector in both models", ["", ...Object.values(SIDES)], pairs, "numbers")] : []),
      ...(rows.length ? [table("What training did to it", ["", "value"], rows, "numbers")] : []),
    ];
  }

  function lensLists(data, row) {
    const rows = Object.entries(LENS)
      .map(([name, title]) => [title, ...Object.keys(SIDES).map((side) => tokensOf(data, `${name}_${side}`, row))])
      .filter(([, ...lists]) => lists.some((list) => list.length))
      .map(([title, ...lists]) => [title, ...lists.map(chips)]);
    if (!rows.length) return [];
    const caption = "Through the unembedding, strongest first; ␣ is a space";
    return [element("h4", "Logit lens"), table(caption, ["", ...Object.values(SIDES)], rows, "texts")];
  }

  function chips(tokens) {
    const list = element("ul", undefined, "chips");
    list.append(...tokens.map((token) => element("li", visible(token))));
    return list;
  }

  function activity(data, unit) {
    const place = unit === null || !data.activity.units ? -1 : data.activity.units.indexOf(unit);
    if (place < 0) return [];
    const names = Object.keys(data.activity.columns).filter((name) => name.endsWith("_before"));
    const rows = names.map((name) => {
      const base = name.slice(0, -"_before".length);
      const values = Object.keys(SIDES).map((side) => (data.activity.columns[`${base}_${side}`] || [])[place]);
      return [activityName(base), ...values.map(shown)];
    });
    const caption = "Of its unit's output |a|, over all tokens read";
    return [element("h4", "Activity"), table(caption, ["", ...Object.values(SIDES)], rows, "numbers")];
  }

  function activityName(base) {
    const quantile = /^q(\d+)$/.exec(base);
    if (quantile) return `${quantile[1]}% quantile`;
    return { mean: "mean", active: "share of tokens on which it is active" }[base] || base.replaceAll("_", " ");
  }

  function contexts(data, unit) {
    const found = unit === null ? undefined : data.contexts[unit];
    if (!found) return [];
    const lists = Object.entries(SIDES)
      .filter(([side]) => found[side])
      .flatMap(([side, title]) => [element("h4", `Tokens that activate its unit most: ${title} model`), contextList(found[side])]);
    return lists;
  }

  function contextList(entries) {
    const list = element("ol", undefined, "contexts");
    for (const [activation, left, token, right] of entries) {
      const item = element("li");
      item.append(element("span", shown(activation), "activation"), left, element("mark", token), right);
      list.append(item);
    }
    return list;
  }

  // Controls

  function fillFilter(id, everything, options) {
    const select = byId(id);
    select.append(new Option(everything, ""), ...options.map(([value, label]) => new Option(label, value)));
  }

  function distinct(values) {
    return [...new Set(values)].filter((value) => value !== null);
  }

  function fillFilters(data) {
    const { layer, role, category } = data.columns;
    const layers = distinct(layer).sort((first, second) => first - second);
    fillFilter("filter-layer", "all", layers.map((value) => [value, value]));
    fillFilter("filter-role", "all", distinct(role).map((value) => [value, value]));
    if (category) {
      fillFilter("filter-category", "all", distinct(category).sort().map((value) => [value, data.categories[value]]));
    } else {
      byId("category-label").hidden = true;
    }
  }

  function readFilters() {
    return {
      text: byId("neuron-search").value,
      layer: byId("filter-layer").value,
      role: byId("filter-role").value,
      category: byId("filter-category").value,
    };
  }

  function listen(state) {
    const form = document.querySelector(".filters");
    const refresh = () => {
      state.filters = readFilters();
      showTable(state);
    };
    form.addEventListener("input", refresh);
    form.addEventListener("submit", (event) => event.preventDefault());
    // The fields are empty only after the event.
    form.addEventListener("reset", () => setTimeout(refresh));
    for (const button of document.querySelectorAll("[data-page]")) {
      button.addEventListener("click", () => turnTo(state, button.dataset.page));
    }
    const dialog = byId("neuron-dialog");
    byId("neuron-close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
  }

  async function showNeurons() {
    const data = await unpack(byId("neuron-data").textContent);
    const columns = COLUMNS.filter((column) => isPresent(data, column));
    const state = { data, columns, filters: null, sort: null, texts: null, rows: [], page: 0 };
    fillFilters(data);
    state.filters = readFilters();
    showHeader(state);
    showTable(state);
    listen(state);
    byId("neuron-explorer").hidden = false;
  }

  function sayFailed(error) {
    const place = byId("neuron-failure");
    place.textContent = `The table of neurons cannot be shown by this browser (${error.message}).`;
    place.hidden = false;
  }

  // Contents: mark the part that is read

  function followReading() {
    const links = new Map(
      [...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]),
    );
    const observer = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          const link = links.get(entry.target.id);
          if (entry.isIntersecting) link.setAttribute("aria-current", "true");
          else link.removeAttribute("aria-current");
        }
      },
      { rootMargin: "-20% 0px -79% 0px" },
    );
    document.querySelectorAll("main > section").forEach((section) => observer.observe(section));
  }

  followReading();
  if (byId("neuron-data")) showNeurons().catch(sayFailed);
})();
