"use strict";
// The owner's page: asks for the results every few seconds while it is looked at, and draws what changed.
(() => {
  const EVERY = 4000; // ms between two looks at the results
  const LONGEST = 60000; // ms between two tries when the server does not answer
  const PATIENCE = 90000; // ms for one request: statistics of many votes take their time
  const SVG = "http://www.w3.org/2000/svg";
  const MIDDLE = 15; // of a bar's height, px
  const $ = (id) => document.getElementById(id);
  const token = location.hash.slice(1);

  // ---- the server

  class Refused extends Error {
    constructor(status, text) {
      super(text);
      this.status = status;
    }
  }

  const request = async (path, body) => {
    const headers = { Authorization: `Bearer ${token}` };
    if (body) headers["Content-Type"] = "application/json";
    const response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      signal: AbortSignal.timeout(PATIENCE),
    });
    if (!response.ok) {
      const said = await response.json().catch(() => null);
      throw new Refused(response.status, said?.error ?? `The server answered with status ${response.status}.`);
    }
    return path.endsWith(".csv") ? response.blob() : response.json();
  };
  const why = (error) => (error instanceof Refused ? error.message : "No connection to the server.");

  // ---- elements: text is only ever set as text

  const make =
    (space) =>
    (tag, attributes = {}, ...children) => {
      const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
      for (const [name, value] of Object.entries(attributes)) {
        if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
      }
      element.append(...children.filter((child) => child !== null));
      return element;
    };
  const h = make(null);
  const svg = make(SVG);

  // Makes an element's children those of another, changing only what differs: focus, scrolling and open parts stay.
  const morph = (old, next) => {
    const before = [...old.childNodes];
    const after = [...next.childNodes];
    after.forEach((child, i) => {
      const twin = before[i];
      if (!twin) old.append(child);
      else if (twin.nodeName !== child.nodeName || twin.dataset?.key !== child.dataset?.key) twin.replaceWith(child);
      else if (child.nodeType === Node.TEXT_NODE) {
        if (twin.data !== child.data) twin.data = child.data;
      } else {
        for (const { name } of [...twin.attributes]) {
          if (!child.hasAttribute(name) && name !== "open") twin.removeAttribute(name);
        }
        for (const { name, value } of child.attributes)
          if (twin.getAttribute(name) !== value) twin.setAttribute(name, value);
        morph(twin, child);
      }
    });
    before.slice(after.length).forEach((child) => child.remove());
  };
  const draw = (id, ...children) => morph($(id), h("div", {}, ...children));

  // ---- numbers as words

  const NONE = "–";
  const fixed = (value, digits) =>
    value === null || value === undefined ? NONE : value.toFixed(digits).replace("-", "−");
  const percent = (value) => (value === null || value === undefined ? NONE : `${(100 * value).toFixed(0)} %`);
  const seconds = (value) => (value === null || value === undefined ? NONE : `${fixed(value, 1)} s`);
  const many = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
  const range = ([low, high], digits = 3) => `${fixed(low, digits)} to ${fixed(high, digits)}`;
  const versus = ([first, second]) => [h("bdi", {}, second), " against ", h("bdi", {}, first)];
  const decided = ([low, high]) => low > 0.5 || high < 0.5;

  // Krippendorff's usual limits, 0.667 and 0.8; below them he would draw no conclusions from single answers.
  const agreement = (alpha) => {
    if (alpha === null) {
      return "It can be computed once two people have voted on one comparison and not all votes are equal.";
    }
    if (alpha >= 0.8) return "The voters agree closely: nearly any of them would give the same result.";
    if (alpha >= 0.667) return "The voters agree well.";
    if (alpha >= 0.2) return "The voters share a taste in part: the majority says more than one person's vote.";
    const reasons =
      "tastes differ, the images hardly differ, votes were careless, or one model wins so often that chance ";
    return `The voters agree ${alpha > 0 ? "hardly" : "no"} more than by chance: ${reasons}would agree as well.`;
  };

  // ---- pictures

  const line = (kind, x1, x2, y1, y2) => svg("line", { class: kind, x1: `${100 * x1}%`, x2: `${100 * x2}%`, y1, y2 });

  // One row: a name, a bar from `from` to the value with its interval, the value. All places are shares of the width.
  const bar = (name, beneath, value, ci, { at, from, kind, spoken, digits }) => {
    const [low, middle, high] = [at(ci[0]), at(value), at(ci[1])];
    const parts = [
      svg("title", {}, spoken),
      svg("rect", { class: "track", x: 0, width: "100%", y: MIDDLE - 1, height: 2 }),
    ];
    if (kind) {
      const x = `${100 * Math.min(middle, from)}%`;
      parts.push(
        svg("rect", { class: kind, x, width: `${100 * Math.abs(middle - from)}%`, y: MIDDLE - 8, height: 16 }),
      );
    }
    parts.push(line("even", from, from, 0, 2 * MIDDLE), line("whisker", low, high, MIDDLE, MIDDLE));
    for (const end of [low, high]) parts.push(line("whisker", end, end, MIDDLE - 5, MIDDLE + 5));
    parts.push(svg("circle", { class: "dot", cx: `${100 * middle}%`, cy: MIDDLE, r: 4.5 }));
    return h(
      "li",
      {},
      h("span", { class: "name" }, ...name, h("small", {}, beneath)),
      svg("svg", { class: "bar", height: 2 * MIDDLE, role: "img", "aria-label": spoken }, ...parts),
      h("span", { class: "value" }, h("b", {}, fixed(value, digits)), h("small", {}, range(ci, digits))),
    );
  };

  const axis = (marks) => {
    const parts = marks.flatMap(([share, text]) => {
      const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
      return [line("", share, share, 0, 5), svg("text", { x: `${100 * share}%`, y: 19, "text-anchor": anchor }, text)];
    });
    return h("li", { class: "axis", "aria-hidden": "true" }, svg("svg", { height: 24 }, ...parts));
  };

  const winRates = (rows) => {
    const items = rows.map(({ name, spoken, beneath, value, ci }) =>
      bar(name, beneath, value, ci, {
        at: (x) => x,
        from: 0.5,
        kind: (value > 0.5 ? "win" : "loss") + (decided(ci) ? "" : " open"),
        spoken: `${spoken}: win rate ${fixed(value, 3)}, 95% interval ${range(ci)}`,
        digits: 3,
      }),
    );
    return h("ul", { class: "bars" }, ...items, axis([0, 0.25, 0.5, 0.75, 1].map((x) => [x, String(x)])));
  };

  const strengths = (ranking) => {
    const ends = ranking.flatMap(({ strength, ci95 }) => [strength, ...ci95]);
    const [low, high] = [Math.min(0, ...ends), Math.max(0, ...ends)];
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50].find((size) => (high - low) / size <= 6) ?? 100;
    const [first, last] = [Math.floor(low / step), Math.max(Math.ceil(high / step), Math.floor(low / step) + 1)];
    const at = (x) => (x / step - first) / (last - first);
    const marks = Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
    const beneath = (rate, unbounded) =>
      `wins ${percent(rate)} against an average model` + (unbounded ? "; the votes do not bound its distance" : "");
    const items = ranking.map(({ model, strength, ci95, unbounded, win_rate_against_average: rate }) =>
      bar([h("bdi", {}, model)], beneath(rate, unbounded), strength, ci95, {
        at,
        from: at(0),
        kind: null,
        spoken: `${model}: strength ${fixed(strength, 2)}, 95% interval ${range(ci95, 2)}`,
        digits: 2,
      }),
    );
    return h("ul", { class: "bars" }, ...items, axis(marks.map((x) => [at(x), fixed(x, step < 1 ? 1 : 0)])));
  };

  // A table that scrolls in its own box. rows: cells, each a text, a node or an array of these; the first is a name.
  const table = (label, head, rows) =>
    h(
      "div",
      { class: "scroll", role: "region", "aria-label": label, tabindex: 0 },
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, ...head.map((name) => h("th", { scope: "col" }, name)))),
        h(
          "tbody",
          {},
          ...rows.map(({ cells: [name, ...cells], kind = null, key = null }) =>
            h(
              "tr",
              { class: kind, "data-key": key },
              h("th", { scope: "row" }, ...[name].flat()),
              ...cells.map((cell) => h("td", {}, ...[cell].flat())),
            ),
          ),
        ),
      ),
    );
  const rate = (value, ci) => (value === null ? NONE : [fixed(value, 3), h("small", {}, range(ci))]);

  // ---- the page

  // Of several pairs of models: who leads, and how many of the pairs are decided.
  const headline = (of, pairs) => {
    const number = pairs.filter((pair) => decided(pair.ci95)).length;
    const text = `Of ${pairs.length} pairs of models ${number} are decided: the 95% interval does not hold 0.5.`;
    const [best, second] = of.ranking ?? [];
    if (!best || best.unbounded) return [text];
    const clear = best.ci95[0] > second.ci95[1];
    const lead = clear ? " is the strongest model. " : ` leads, but its interval overlaps that of ${second.model}. `;
    return [h("b", {}, best.model), lead, text];
  };

  const question = (id, of, groups) => {
    const known = of.pairs.filter((pair) => pair.win_rate !== null);
    const grouped = (pair) => (groups > 1 ? [h("small", {}, pair.group)] : []);
    const parts = [h("h2", {}, of.text)];
    if (!known.length) parts.push(h("p", {}, "No comparison has a majority yet."));
    else if (of.pairs.length === 1) {
      const [pair] = known;
      const sure = decided(pair.ci95);
      const first = [h("strong", {}, fixed(pair.win_rate, 3)), `win rate of ${pair.models[1]}, ties counted half`];
      const kind = !sure ? null : pair.win_rate > 0.5 ? "better" : "worse";
      const winner = pair.win_rate > 0.5 ? pair.models[1] : pair.models[0];
      const loser = pair.win_rate > 0.5 ? pair.models[0] : pair.models[1];
      const text = sure
        ? ["People prefer ", h("b", {}, winner), " to ", h("bdi", {}, loser), `: 95% interval ${range(pair.ci95)}.`]
        : [`Not decided: the 95% interval, ${range(pair.ci95)}, holds 0.5.`];
      parts.push(h("div", { class: "lead" }, h("p", {}, ...first), h("p", { class: kind }, ...text)));
    } else parts.push(h("p", {}, ...headline(of, known)));
    for (const note of new Set(known.map((pair) => pair.note).filter(Boolean))) {
      parts.push(h("p", { class: "hint" }, `Intervals: ${note}.`));
    }
    if (known.length) {
      const rows = known.map((pair) => ({
        name: versus(pair.models),
        spoken: `${pair.models[1]} against ${pair.models[0]}`,
        beneath: [...(groups > 1 ? [pair.group] : []), many(pair.comparisons, "comparison")].join(", "),
        value: pair.win_rate,
        ci: pair.ci95,
      }));
      const marks = [
        ["win", "first named model ahead"],
        ["loss", "second ahead"],
        ["open", "pale: the interval holds 0.5"],
      ];
      parts.push(
        h("p", { class: "legend" }, ...marks.map(([kind, text]) => h("span", {}, h("i", { class: kind }), text))),
        winRates(rows),
      );
    }
    if (of.ranking?.length) {
      parts.push(
        h("h3", {}, "Strength of each model"),
        h(
          "p",
          { class: "hint" },
          "From all pairs at once (Bradley-Terry with ties, Davidson 1970). 0 is the average of the models; " +
            "a difference of 1 means odds of e : 1 among votes that are no ties.",
        ),
        strengths(of.ranking),
      );
    }
    if (of.ranking_note) parts.push(h("p", { class: "hint" }, `Strengths: ${of.ranking_note}.`));
    parts.push(
      h(
        "p",
        { class: "agreement" },
        h("b", {}, `Agreement: ${of.alpha === null ? "not known yet" : `alpha ${fixed(of.alpha, 2)}`}`),
        of.alpha_ci95 ? ` (95% interval ${range(of.alpha_ci95, 2)}). ` : ". ",
        agreement(of.alpha),
        h("small", {}, " Krippendorff's alpha: 1 if all voters always agree, 0 if they agree as often as by chance."),
      ),
    );
    const head = ["Models", "Win rate", "By single votes", "Won", "Tied", "Lost", "Votes", "Open"];
    const rows = of.pairs.map((pair) => ({
      cells: [
        [...versus(pair.models), ...grouped(pair)],
        rate(pair.win_rate, pair.ci95),
        rate(pair.by_votes, pair.by_votes_ci95),
        ...[pair.wins, pair.ties, pair.losses, pair.votes, pair.undecided].map(String),
      ],
    }));
    parts.push(
      h(
        "details",
        {},
        h("summary", {}, "Pairs of models"),
        h(
          "p",
          { class: "hint" },
          "Won, tied and lost count comparisons by majority, for the model named first. " +
            "Open: comparisons with fewer votes than wanted.",
        ),
        table(`Pairs of models: ${of.text}`, head, rows),
      ),
    );
    const slices = of.pairs.flatMap((pair) =>
      Object.entries(pair.categories ?? {}).map(([name, slice]) => ({
        cells: [
          h("bdi", {}, name),
          [...versus(pair.models), ...grouped(pair)],
          rate(slice.win_rate, slice.ci95),
          String(slice.comparisons),
        ],
      })),
    );
    if (slices.length) {
      const columns = ["Category", "Models", "Win rate", "Comparisons"];
      parts.push(h("details", {}, h("summary", {}, "Categories"), table(`Categories: ${of.text}`, columns, slices)));
    }
    return h("section", { "data-key": id }, ...parts);
  };

  const totals = (of) => {
    const facts = [
      ["Votes", of.live ? `${of.votes} of ${of.live.votes_wanted}` : String(of.votes)],
      ["Voters", String(of.voters)],
      ["Comparisons", String(of.comparisons)],
      ["Time a vote, median", seconds(of.seconds_median)],
    ];
    const share = of.wanted ? of.complete / of.wanted : 0;
    const done = `${of.complete} of ${of.wanted} have all their votes (${percent(share)}), each question counted.`;
    return [
      h("dl", {}, ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      h("progress", {
        max: Math.max(of.wanted, 1),
        value: of.complete,
        "aria-label": "Comparisons with all their votes",
      }),
      h("p", { class: "hint" }, done),
      h("p", { class: "hint" }, `By majority: ${of.rule}.`),
    ];
  };

  // How long ago a voter last asked for anything.
  const ago = (idle) => {
    if (idle === undefined) return NONE;
    if (idle < 60) return "now";
    if (idle < 3600) return `${Math.floor(idle / 60)} min ago`;
    return idle < 86400 ? `${Math.floor(idle / 3600)} h ago` : `${Math.floor(idle / 86400)} d ago`;
  };

  // All voters, those who have not voted yet too.
  const everybody = ({ by_voter: voted, live }) => {
    const known = new Map(voted.map((voter) => [voter.name, voter]));
    const none = { votes: 0, seconds_median: null, left_share: null, tie_share: null, agrees_with_majority: null };
    const waiting = (live?.voters ?? []).filter(({ name }) => !known.has(name));
    const came = (live?.voters ?? []).filter((voter) => voter.done || voter.open); // the others never opened their link
    const idle = new Map(came.map((voter) => [voter.name, voter.idle_seconds]));
    const rows = [
      ...voted,
      ...waiting.map(({ name }) => ({ name, ...none, checks: 0, checks_failed: 0, excluded: null })),
    ];
    return rows.map((voter) => ({ ...voter, seen: ago(idle.get(voter.name)) }));
  };

  const voters = (rows) => {
    const head = ["Name", "Votes", "Seconds", "Left", "Ties", "With the majority", "Checks failed", "Seen", "Change"];
    return table(
      "Table of voters",
      head,
      rows.map((voter) => {
        const out = voter.excluded !== null;
        const button = (act, text) =>
          h(
            "button",
            {
              type: "button",
              class: "small",
              "data-act": act,
              "data-name": voter.name,
              "aria-label": `${text}: ${voter.name}`,
            },
            text,
          );
        return {
          key: voter.name,
          kind: out ? "out" : null,
          cells: [
            [h("bdi", {}, voter.name), ...(out ? [h("small", {}, `Excluded: ${voter.excluded}`)] : [])],
            String(voter.votes),
            fixed(voter.seconds_median, 1),
            percent(voter.left_share),
            percent(voter.tie_share),
            percent(voter.agrees_with_majority),
            !voter.checks
              ? NONE
              : h(voter.checks_failed ? "mark" : "span", {}, `${voter.checks_failed} of ${voter.checks}`),
            voter.seen,
            h(
              "div",
              { class: "actions" },
              out ? button("include", "Include") : button("exclude", "Exclude"),
              button("link", "New link"),
            ),
          ],
        };
      }),
    );
  };

  let latest = null;
  const show = (results) => {
    latest = results;
    const groups = new Set(Object.values(results.questions).flatMap((of) => of.pairs.map((pair) => pair.group))).size;
    draw("totals", ...totals(results));
    draw("questions", ...Object.entries(results.questions).map(([id, of]) => question(id, of, groups)));
    draw(
      "by-voter",
      h(
        "p",
        { class: "hint" },
        "Nobody is excluded but by you. Seconds: the median of a vote. With the majority: how often a vote is " +
          "that of the others on a comparison.",
      ),
      everybody(results).length ? voters(everybody(results)) : h("p", {}, "There is nobody yet: add voters below."),
    );
    $("voters").hidden = $("files").hidden = false;
    $("live").textContent = `Live, as of ${new Date().toLocaleTimeString()}`;
    trouble("");
  };

  const trouble = (text) => {
    if ($("trouble").textContent !== text) $("trouble").textContent = text;
    $("trouble").hidden = !text;
  };

  // ---- looking again, while the page is seen

  let timer = null;
  let failures = 0;
  let looking = false;
  const look = async () => {
    clearTimeout(timer);
    if (document.hidden || looking) return;
    looking = true;
    try {
      show(await request("/api/owner/results"));
      failures = 0;
    } catch (error) {
      failures++;
      if ([401, 403].includes(error.status)) {
        $("live").textContent = "Not shown";
        trouble(`${error.message} Open the owner's link that the command printed.`);
        return; // no look will change that
      }
      trouble(`${why(error)} ${latest ? "The numbers below may be old." : ""} The page tries again by itself.`);
    } finally {
      looking = false;
    }
    clearTimeout(timer);
    timer = setTimeout(look, Math.min(LONGEST, EVERY * 2 ** Math.min(failures, 6)));
  };

  // ---- what the owner does

  const say = (text) => ($("say").textContent = text);
  const attempt = async (action) => {
    try {
      await action();
    } catch (error) {
      trouble(why(error));
    }
  };

  // Asks before something that has consequences; resolves to the reason ("" where none is asked for) or null.
  const ask = (title, text, yes, needsReason) =>
    new Promise((resolve) => {
      $("sure-title").textContent = title;
      $("sure-text").textContent = text;
      $("sure-yes").textContent = yes;
      $("reason-row").hidden = !needsReason;
      $("reason").required = needsReason;
      $("reason").value = "";
      $("sure").returnValue = "";
      $("sure").addEventListener(
        "close",
        () => resolve($("sure").returnValue === "yes" ? $("reason").value.trim() : null),
        { once: true },
      );
      $("sure").showModal();
    });
  $("sure-form").addEventListener("submit", (event) => {
    event.preventDefault();
    $("sure").close("yes");
  });
  $("sure-no").addEventListener("click", () => $("sure").close());

  const showLink = ({ name, link }) => {
    $("link-text").textContent = `The link of ${name}. It is shown only now: send it to that person alone.`;
    $("link-value").value = link;
    $("copy").textContent = "Copy";
    $("link").hidden = false;
    $("link-value").focus();
    $("link-value").select();
  };

  const exclude = async (name, excluded) => {
    const reason = excluded
      ? await ask(
          `Exclude ${name}?`,
          "Their votes leave all results, and the results say so. The votes are kept: you can include them again.",
          "Exclude",
          true,
        )
      : await ask(`Include ${name} again?`, "Their votes count again.", "Include", false);
    if (reason === null) return;
    await attempt(async () => {
      show(await request("/api/owner/exclude", { name, excluded, reason }));
      say(excluded ? `${name} is excluded: ${reason}` : `${name} is included again.`);
    });
  };

  const newLink = async (name, text = "The old link stops working at once. Votes stay.") => {
    if ((await ask(`A new link for ${name}?`, text, "Make a new link", false)) === null) return;
    await attempt(async () => showLink(await request("/api/owner/links", { name })));
  };

  $("by-voter").addEventListener("click", (event) => {
    const { act, name } = event.target.closest("button")?.dataset ?? {};
    if (act === "exclude" || act === "include") exclude(name, act === "exclude");
    if (act === "link") newLink(name);
  });

  $("add").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = $("name").value.trim();
    if (!name) return;
    attempt(async () => {
      try {
        showLink(await request("/api/owner/voters", { name }));
      } catch (error) {
        if (error.status !== 409) throw error;
        return newLink(name, `${error.message} A new link can be made; the old one then stops working. Votes stay.`);
      }
      $("add").reset();
      look();
    });
  });

  $("copy").addEventListener("click", async () => {
    $("link-value").select();
    try {
      await navigator.clipboard.writeText($("link-value").value);
    } catch {
      if (!document.execCommand("copy")) return say("Select the link and copy it."); // without TLS only this is allowed
    }
    $("copy").textContent = "Copied";
    say("The link is copied.");
  });

  $("download").addEventListener("click", () =>
    attempt(async () => {
      const url = URL.createObjectURL(await request("/api/owner/votes.csv"));
      h("a", { href: url, download: "votes.csv" }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60000); // the browser reads it after the click
    }),
  );

  document.addEventListener("visibilitychange", look);
  addEventListener("online", look);
  addEventListener("hashchange", () => location.reload()); // another link in the same tab
  if (token) look();
  else trouble("This link is not whole: it ends with # and a key. Open the owner's link that the command printed.");
})();
