"use strict";
// The voter's page: shows two images, sends which one was chosen, and shows the next two, which are there already.
(() => {
  const PATIENCE = 20000; // ms for one request
  const LONGEST_WAIT = 30000; // ms between two tries without a connection
  const SETTLE = 250; // ms after new images in which nothing counts as a vote: a double click is one vote
  const REST = 20; // votes after which the page offers to stop
  const SWIPE = 56; // px that a finger travels for a vote
  const SLIP = 10; // px that a finger or mouse may move in a tap
  const ZOOM = { first: 2.5, most: 12, wheel: 0.002 }; // wheel: the logarithm of a zoom per px
  const PAN = 60; // px of an arrow key
  const SMALL = 640; // px up to which an image is enlarged
  const STACK = 1.7; // images stand above each other where that makes them so much larger
  const GAP = 8; // px between the images
  const KEYS = { 1: "left", 2: "right", 0: "tie" };
  const CODES = { Digit1: "left", Numpad1: "left", Digit2: "right", Numpad2: "right", Digit0: "tie", Numpad0: "tie" };

  const $ = (id) => document.getElementById(id);
  const figures = { left: $("left"), right: $("right") };
  const choices = [...document.querySelectorAll("[data-choice]")];
  const images = new Map(); // path -> promise of an <img> that is decoded; its URL is revoked when the pair is over

  let token = "";
  let state = null; // the server's last answer
  let shown = null; // the pair on the screen
  let busy = false; // one thing at a time
  let settled = 0; // when the images on the screen begin to take votes
  let given = 0; // votes since the last rest
  let retry = null; // ends the wait between two tries
  let stacked = false;
  let view = { zoom: 1, x: 0.5, y: 0.5 }; // x, y: what is in the middle, as shares of the sides

  // ---- what the page says

  const say = (text) => ($("say").textContent = text);
  const many = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
  const side = (choice) =>
    (stacked ? { left: "Top", right: "Bottom" } : { left: "Left", right: "Right" })[choice] ?? "Tie";

  const screen = (name) => {
    document.body.dataset.state = name;
    $("voting").hidden = !["voting", "sending"].includes(name);
    $("message").hidden = !$("voting").hidden;
    $("pause").hidden = $("voting").hidden;
    if ($("voting").hidden) {
      down.clear();
      gesture = null;
    }
  };

  const message = (name, title, text, { goOn = "", back = false } = {}) => {
    screen(name);
    $("message-title").textContent = title;
    $("message-text").textContent = text;
    $("go-on").textContent = goOn;
    $("go-on").hidden = !goOn;
    $("take-back").hidden = !back;
    document.title = title;
    $("message-title").focus();
  };

  // ---- the server

  class Refused extends Error {
    constructor(status, text, wait) {
      super(text);
      this.status = status;
      this.wait = wait; // seconds, as the server asks
      this.passing = status === 408 || status === 429 || status >= 500;
    }
  }

  const request = async (path, body) => {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
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
    if (response.ok) return path.startsWith("/api/image/") ? response.blob() : response.json();
    const said = await response.json().catch(() => null);
    throw new Refused(
      response.status,
      said?.error ?? `status ${response.status}`,
      Number(response.headers.get("Retry-After")),
    );
  };

  // Does a task again until the server answers, and says so meanwhile.
  const persist = async (task, lost) => {
    for (let tries = 0; ; tries++) {
      try {
        const result = await task();
        if (tries) {
          $("trouble").hidden = true;
          $("trouble-text").textContent = "";
          say("Connected again.");
        }
        return result;
      } catch (error) {
        if (error instanceof Refused && !error.passing) {
          $("trouble").hidden = true;
          throw error;
        }
        const why =
          error instanceof Refused ? `The server is busy (${error.message}).` : "No connection to the server.";
        const wait = Math.min(LONGEST_WAIT, 1000 * 2 ** Math.min(tries, 10));
        await pause(Math.max(wait, 1000 * (error.wait || 0)), `${why} ${lost}`);
      }
    }
  };

  const pause = (wait, text) =>
    new Promise((resolve) => {
      const end = performance.now() + wait;
      const tick = () => {
        const left = Math.ceil((end - performance.now()) / 1000);
        $("countdown").textContent = left > 0 ? `Next try in ${left} s.` : "Trying …";
        if (left <= 0) retry();
      };
      const timer = setInterval(tick, 250);
      retry = () => {
        clearInterval(timer);
        removeEventListener("online", retry);
        $("countdown").textContent = "Trying …";
        retry = null;
        resolve();
      };
      addEventListener("online", retry);
      if ($("trouble-text").textContent !== text) $("trouble-text").textContent = text; // read aloud once
      $("trouble").hidden = false;
      tick();
    });

  // A vote that the server has not confirmed outlives this page: it is sent when the link is opened again.
  const storage = {
    get: (key) => {
      try {
        return localStorage.getItem(key);
      } catch {
        return null; // switched off in this browser
      }
    },
    set: (key, value) => {
      try {
        if (value === null) localStorage.removeItem(key);
        else localStorage.setItem(key, value);
      } catch {
        // switched off in this browser: the vote is kept as long as the page is open
      }
    },
  };
  const waiting = {
    key: () => `vote ${token}`,
    get: () => {
      try {
        return JSON.parse(storage.get(waiting.key()));
      } catch {
        return null;
      }
    },
    set: (vote) => {
      waiting.open = vote !== null;
      storage.set(waiting.key(), vote && JSON.stringify(vote));
    },
    open: false,
  };

  const pairs = () => persist(() => request("/api/pairs"), "The page goes on by itself.");

  // Sends a vote; returns what comes next, and what to say of the vote. One that the server did not take is no vote.
  const send = async (vote) => {
    waiting.set(vote);
    try {
      const answer = await persist(() => request("/api/vote", vote), "Your vote is kept and will be sent.");
      return [answer, `Saved: ${side(vote.choice).toLowerCase()}.`];
    } catch (error) {
      if (![404, 409].includes(error.status)) throw error;
      return [await pairs(), `That vote did not count. ${error.message}`];
    } finally {
      waiting.set(null);
    }
  };

  // ---- images

  const load = (path) => {
    if (!images.has(path)) {
      const loading = (async () => {
        const image = new Image();
        image.src = URL.createObjectURL(await request(path));
        image.draggable = false;
        await image.decode();
        return image;
      })();
      images.set(path, loading);
      loading.catch(() => images.get(path) === loading && images.delete(path));
    }
    return images.get(path);
  };
  const loadPair = (pair) => Promise.all([load(pair.left), load(pair.right)]);

  const forget = (keep) => {
    for (const [path, loading] of images) {
      if (keep.some((pair) => path === pair.left || path === pair.right)) continue;
      images.delete(path);
      loading.then(
        (image) => URL.revokeObjectURL(image.src),
        () => {},
      );
    }
  };

  // ---- one step

  const act = async (action) => {
    if (busy) return;
    busy = true;
    offer();
    try {
      await action();
    } catch (error) {
      failed(error);
    } finally {
      busy = false;
      offer();
    }
  };

  const failed = (error) => {
    forget([]);
    shown = null;
    if (error.status === 401 || error.status === 403)
      message("refused", "This link does not work", `${error.message} Ask whoever sent it for a new one.`);
    else
      message("failed", "Something went wrong", `${error.message}. Votes that were confirmed are saved.`, {
        goOn: "Try again",
      });
  };

  // Shows what the server wants answered next.
  const show = async (answer, before = "") => {
    for (let tries = 0; ; tries++) {
      state = answer;
      progress();
      forget(state.pairs);
      if (!state.pairs.length) return finish();
      const [pair, next] = state.pairs;
      try {
        const [left, right] = await persist(() => loadPair(pair), "The images come as soon as it is back.");
        place(pair, left, right, before);
        if (next) loadPair(next).catch(() => {}); // asked for again when it is its turn
        return;
      } catch (error) {
        if (error.status !== 404 || tries === 3) throw error; // its images are gone: it was answered elsewhere
        answer = await pairs();
      }
    }
  };

  const place = (pair, left, right, before) => {
    const from = document.activeElement;
    const moved = shown && shown.question.id !== pair.question.id;
    shown = pair;
    view = { zoom: 1, x: 0.5, y: 0.5 };
    $("question").textContent = pair.question.text;
    $("question").classList.toggle("changed", Boolean(moved));
    $("prompt-text").textContent = pair.prompt;
    $("prompt").scrollTop = 0;
    mark(null);
    screen("voting");
    figures.left.replaceChildren(left);
    figures.right.replaceChildren(right);
    layout();
    document.title = pair.question.text;
    $("note").textContent = before || (state.done < 3 ? hint() : "");
    const of = state.target === null ? "" : ` of ${state.target}`;
    say(
      [before, `Pair ${state.done + 1}${of}. ${pair.question.text} Prompt: ${pair.prompt}`].filter(Boolean).join(" "),
    );
    if (!document.contains(from) || from.closest("[hidden]") || from === $("message-title")) $("question").focus();
    settled = performance.now() + SETTLE;
  };

  const hint = () => {
    if (!matchMedia("(hover: none) and (pointer: coarse)").matches)
      return "Every vote is saved at once. You can stop at any time.";
    return stacked ? "Tap the better image." : "Tap the better image, or swipe towards it. Pinch to zoom.";
  };

  const progress = () => {
    const known = state.target !== null;
    $("bar").hidden = !known;
    if (known) {
      $("bar").max = Math.max(state.target, 1);
      $("bar").value = state.done;
    }
    $("count").textContent = known ? `${state.done} of ${state.target}` : many(state.done, "vote");
  };

  const mark = (choice) => {
    for (const name of ["left", "right"]) figures[name].classList.toggle("chosen", choice === name || choice === "tie");
    for (const button of choices) button.classList.toggle("chosen", button.dataset.choice === choice);
  };

  // What cannot be pressed now is said to be so, but keeps the focus.
  const offer = () => {
    for (const button of choices) button.setAttribute("aria-disabled", String(busy));
    $("undo").setAttribute("aria-disabled", String(busy || !state?.can_undo));
  };

  const vote = (choice) => {
    if (!shown || $("voting").hidden || performance.now() < settled) return;
    act(async () => {
      mark(choice);
      screen("sending");
      const [answer, said] = await send({ showing: shown.showing, choice });
      given += answer.done > state.done;
      const left = answer.target === null ? Infinity : answer.target - answer.done;
      if (given < REST || !answer.pairs.length || left < REST / 4) return show(answer, said);
      given = 0;
      rest(answer, "A good moment for a break");
    });
  };

  const undo = () => {
    if (!state?.can_undo || !["voting", "pause", "finished"].includes(document.body.dataset.state)) return;
    act(async () => {
      let answer;
      try {
        answer = await request("/api/undo", {});
      } catch (error) {
        if (error instanceof Refused && !error.passing && error.status !== 409) throw error;
        answer = await pairs(); // whether it arrived shows in the count; sent twice it would take back two votes
      }
      const back = answer.done < state.done;
      given = Math.max(0, given - back);
      await show(answer, back ? "Your last vote is taken back." : "Nothing was taken back.");
    });
  };

  const rest = (answer, title) => {
    state = answer;
    progress();
    const left = state.target === null ? "" : ` ${state.target - state.done} to go.`;
    const saved = state.done ? `${many(state.done, "vote")}, all saved.` : "No votes yet.";
    const text = `${saved}${left} You can stop here and go on later with the same link.`;
    message("pause", title, text, { goOn: "Go on", back: state.can_undo });
  };

  const yours = (number) => (number === 1 ? "Your vote is" : `Your ${many(number, "vote")} are`);

  const finish = () => {
    shown = null;
    const back = state.can_undo;
    if (state.finished)
      message("finished", "Done. Thank you!", `${yours(state.done)} saved. You can close this page.`, {
        back,
      });
    else
      message(
        "finished",
        "No pair is free now",
        `${many(state.done, "vote")}, all saved. Others have the last pairs before them.`,
        {
          goOn: "Look again",
          back,
        },
      );
  };

  // ---- where the images stand, and zoom

  const layout = () => {
    if (!shown || $("voting").hidden) return;
    const { width, height } = shown;
    const box = $("images");
    const wide = box.clientWidth;
    box.style.setProperty(
      "--need",
      `${Math.round(Math.min(((wide - GAP) / 2) * (height / width), innerHeight * 0.5))}px`,
    );
    const high = box.clientHeight;
    const fit = (w, h) => Math.min(w / width, h / height, Math.max(width, SMALL) / width);
    const beside = fit((wide - GAP) / 2, high);
    const above = fit(wide, (high - GAP) / 2);
    stacked = above > beside * STACK;
    const scale = (stacked ? above : beside) * view.zoom;
    const zoomed = view.zoom > 1;
    const frame = zoomed
      ? stacked
        ? { width: wide, height: (high - GAP) / 2 }
        : { width: (wide - GAP) / 2, height: high }
      : { width: width * scale, height: height * scale };
    frame.width = Math.floor(frame.width);
    frame.height = Math.floor(frame.height);
    const offset = (length, room, centre) => {
      if (length <= room) return (room - length) / 2;
      return Math.min(0, Math.max(room - length, room / 2 - centre * length));
    };
    const left = offset(width * scale, frame.width, view.x);
    const top = offset(height * scale, frame.height, view.y);
    view.x = (frame.width / 2 - left) / (width * scale);
    view.y = (frame.height / 2 - top) / (height * scale);
    view.scale = scale;

    const stage = $("stage");
    stage.style.setProperty("--gap", `${GAP}px`);
    stage.classList.toggle("stacked", stacked);
    stage.classList.toggle("zoomed", zoomed);
    for (const name of ["left", "right"]) {
      Object.assign(figures[name].style, { width: `${frame.width}px`, height: `${frame.height}px` });
      const image = figures[name].firstElementChild;
      image.alt = `${side(name)} image`;
      const place = `translate(${left}px, ${top}px)`;
      Object.assign(image.style, { width: `${width * scale}px`, height: `${height * scale}px`, transform: place });
    }
    for (const button of choices) button.querySelector("span").textContent = side(button.dataset.choice);
    $("zoom").setAttribute("aria-pressed", String(zoomed));
    const words = $("prompt");
    words.classList.toggle("long", $("prompt-text").scrollHeight > 60);
    words.style.setProperty("--prompt", `${$("prompt-text").scrollHeight}px`);
    if (words.scrollHeight > words.clientHeight + 1)
      words.tabIndex = 0; // scrolled by keys
    else words.removeAttribute("tabindex");
  };

  // Sets the zoom so that the point of an image under (x, y) stays there.
  const zoomTo = (zoom, x = null, y = null) => {
    if (!shown) return;
    const before = view.zoom;
    const at = x === null ? null : pointAt(x, y);
    view.zoom = Math.min(ZOOM.most, Math.max(1, zoom));
    if (view.zoom === 1) Object.assign(view, { x: 0.5, y: 0.5 });
    layout();
    if (at && view.zoom > 1) {
      const now = pointAt(x, y);
      Object.assign(view, { x: view.x + at.x - now.x, y: view.y + at.y - now.y });
      layout();
    }
    if (before > 1 !== view.zoom > 1) {
      const how = matchMedia("(pointer: coarse)").matches
        ? "Drag moves both."
        : "Drag or arrow keys move both, space ends it.";
      $("note").textContent = view.zoom > 1 ? `Both images are enlarged. ${how}` : "";
      say(view.zoom > 1 ? $("note").textContent : "Both images are whole again.");
    }
  };

  const pointAt = (x, y) => {
    for (const figure of Object.values(figures)) {
      const box = figure.getBoundingClientRect();
      if (x < box.left || x > box.right || y < box.top || y > box.bottom) continue;
      const image = figure.firstElementChild.getBoundingClientRect();
      return { x: (x - image.left) / image.width, y: (y - image.top) / image.height };
    }
    return { x: view.x, y: view.y };
  };

  const pan = (dx, dy) => {
    view.x -= dx / (shown.width * view.scale);
    view.y -= dy / (shown.height * view.scale);
    layout();
  };

  const toggleZoom = () => !$("voting").hidden && zoomTo(view.zoom > 1 ? 1 : ZOOM.first, pointer.x, pointer.y);

  // ---- mouse and touch

  const pointer = { x: null, y: null }; // where the mouse is over the images
  const down = new Map(); // fingers on the images
  let gesture = null;

  const middle = () => {
    const [a, b] = [...down.values()];
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.hypot(a.x - b.x, a.y - b.y) };
  };

  // The side that a swipe towards it chooses.
  const swiped = (dx, dy) => {
    if (stacked || Math.abs(dx) < SWIPE || Math.abs(dx) < 1.5 * Math.abs(dy)) return null;
    return dx < 0 ? "left" : "right";
  };

  $("stage").addEventListener("pointerdown", (event) => {
    if (!shown || (event.pointerType === "mouse" && event.button !== 0)) return;
    down.set(event.pointerId, { x: event.clientX, y: event.clientY });
    $("stage").setPointerCapture(event.pointerId);
    if (down.size === 1) {
      const figure = event.target.closest("figure");
      gesture = { kind: "tap", x: event.clientX, y: event.clientY, side: figure && figure.id, showing: shown.showing };
    } else if (down.size === 2) gesture = { kind: "pinch", zoom: view.zoom, ...middle() };
  });

  $("stage").addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse") Object.assign(pointer, { x: event.clientX, y: event.clientY });
    const finger = down.get(event.pointerId);
    if (!finger || !gesture || !shown) return;
    const [dx, dy] = [event.clientX - finger.x, event.clientY - finger.y];
    Object.assign(finger, { x: event.clientX, y: event.clientY });
    if (gesture.kind === "pinch") {
      const now = middle();
      zoomTo((gesture.zoom * now.apart) / Math.max(gesture.apart, 1), now.x, now.y);
      return;
    }
    const [far, up] = [finger.x - gesture.x, finger.y - gesture.y];
    if (gesture.kind === "tap" && Math.hypot(far, up) > SLIP)
      gesture.kind = view.zoom > 1 ? "pan" : event.pointerType === "mouse" ? "none" : "swipe";
    if (gesture.kind === "pan") pan(dx, dy);
    if (gesture.kind === "swipe" && !busy) mark(swiped(far, up));
  });

  const up = (event) => {
    if (!down.delete(event.pointerId) || !gesture) return;
    const done = gesture;
    if (done.kind === "pinch") {
      if (view.zoom < 1.08) zoomTo(1);
      done.kind = "none";
    }
    if (down.size) return;
    gesture = null;
    if (busy || event.type === "pointercancel" || done.showing !== shown?.showing) {
      if (!busy) mark(null);
      return;
    }
    if (done.kind === "swipe") {
      const choice = swiped(event.clientX - done.x, event.clientY - done.y);
      mark(null);
      if (choice) vote(choice);
    } else if (done.kind === "tap" && done.side && view.zoom === 1) vote(done.side);
  };
  $("stage").addEventListener("pointerup", up);
  $("stage").addEventListener("pointercancel", up);
  $("stage").addEventListener("pointerleave", () => Object.assign(pointer, { x: null, y: null }));
  $("stage").addEventListener(
    "wheel",
    (event) => {
      const scrolls = document.documentElement.scrollHeight > innerHeight + 1;
      if (!shown || event.ctrlKey || (view.zoom === 1 && (event.deltaY > 0 || scrolls))) return; // the browser's own
      event.preventDefault();
      const pixels = event.deltaY * (event.deltaMode === 0 ? 1 : 33);
      const zoom = view.zoom * Math.exp(-ZOOM.wheel * pixels);
      zoomTo(zoom < 1.02 ? 1 : zoom, event.clientX, event.clientY);
    },
    { passive: false },
  );

  // ---- buttons and keys

  for (const button of choices) button.addEventListener("click", () => vote(button.dataset.choice));
  for (const button of [...choices, $("undo"), $("zoom")]) {
    button.addEventListener("mousedown", (event) => event.preventDefault()); // else the space key would press it again
  }
  $("undo").addEventListener("click", undo);
  $("take-back").addEventListener("click", undo);
  $("zoom").addEventListener("click", toggleZoom);
  $("again").addEventListener("click", () => retry?.());
  $("pause").addEventListener("click", () => !busy && shown && rest(state, "Pause"));
  $("go-on").addEventListener("click", () => act(async () => show(await pairs())));
  $("help").addEventListener("click", () => $("help-text").showModal());
  $("keys").checked = storage.get("keys") !== "off";
  $("keys").addEventListener("change", () => storage.set("keys", $("keys").checked ? null : "off"));

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help-text").open || !$("keys").checked) return;
    const on = event.target.closest("button, #prompt[tabindex]"); // they have a use for space, the prompt for arrows
    const arrow = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    const letter = event.key.length === 1 && event.key > "~" ? event.code : event.key.toLowerCase(); // other alphabets
    let action = null;
    if (letter === "u" || letter === "KeyU") action = undo;
    else if ($("voting").hidden || (on?.id === "prompt" && arrow)) return;
    else if (event.key === " ") action = on ? null : toggleZoom;
    else if (event.key === "Escape" && view.zoom > 1) action = toggleZoom;
    else if (KEYS[event.key] ?? CODES[event.code]) action = () => vote(KEYS[event.key] ?? CODES[event.code]);
    else if (arrow && view.zoom > 1) action = () => pan(PAN * arrow[0], PAN * arrow[1]);
    else if (arrow && arrow[stacked ? 1 : 0]) action = () => vote(arrow[stacked ? 1 : 0] > 0 ? "left" : "right");
    if (!action) return;
    event.preventDefault();
    if (!event.repeat || (arrow && view.zoom > 1)) action(); // a key held down is one vote
  });

  new ResizeObserver(layout).observe($("images"));
  addEventListener("resize", layout);
  addEventListener("hashchange", () => location.reload()); // another link in the same tab
  addEventListener("beforeunload", (event) => waiting.open && event.preventDefault());

  // ---- the link

  // An invitation makes a voter, once in this browser.
  const join = async (invitation) => {
    token = "";
    token = (await persist(() => request("/api/join", { invitation }), "The page goes on by itself.")).token;
    storage.set(`joined ${invitation}`, token);
  };

  const begin = async () => {
    const vote = waiting.get();
    await show(...(vote ? await send(vote) : [await pairs()]));
  };

  act(async () => {
    screen("loading");
    const [, invitation] = location.hash.match(/^#join=(.+)$/) ?? [];
    if (location.hash.length < 2)
      return message(
        "refused",
        "This link is not whole",
        "It ends with # and a key. Copy all of it, or ask whoever sent it.",
      );
    if (!invitation) {
      token = location.hash.slice(1);
      return begin();
    }
    token = storage.get(`joined ${invitation}`) ?? "";
    try {
      if (!token) await join(invitation);
      await begin();
    } catch (error) {
      if (error.status !== 401) throw error; // the token of that time is no longer good
      await join(invitation);
      await begin();
    }
    history.replaceState(null, "", `#${token}`); // a reload is the same voter
  });
})();
