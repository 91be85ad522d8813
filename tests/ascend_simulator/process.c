/* From aclInit to aclFinalize, and what every call begins with. */
#include "internal.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum state { NEVER, RUNNING, ENDING, ENDED };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t references;
static atomic_int state = NEVER;
static atomic_bool forked;
static pthread_once_t fork_watched = PTHREAD_ONCE_INIT;

/* The child keeps none of the sockets by which others would take it for its parent. */
static void in_forked_child(void)
{
    if (atomic_load(&state) == NEVER)
        return;
    atomic_store(&forked, true);
    sim_table_forked();
    sim_ipc_forked();
}

static void watch_forks(void)
{
    pthread_atfork(sim_ipc_before_fork, sim_ipc_after_fork, in_forked_child);
}

bool sim_running(void)
{
    return atomic_load(&state) == RUNNING;
}

bool sim_ending(void)
{
    int now = atomic_load(&state);
    return now == ENDING || now == ENDED;
}

bool sim_forked(void)
{
    return atomic_load(&forked);
}

static int refuse_fork(const char *function)
{
    return sim_refuse("fork_use", ACL_PARAM_INVALID,
                      "%s: the process was forked after aclInit; only a fresh process can use ACL", function);
}

/* "err_msg_mode" of the configuration: "0" or "1", a text or a number. */
static int read_configuration(const char *path)
{
    char text[4096] = "";
    FILE *file = fopen(path, "r");
    if (!file)
        return sim_fail(ACL_INVALID_FILE, "aclInit: configPath '%s' cannot be opened", path);
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    while (length && strchr(" \t\r\n", text[length - 1]))
        length--;
    text[length] = 0;
    const char *begin = text + strspn(text, " \t\r\n");
    if (*begin != '{' || text[length - 1] != '}')
        return sim_fail(ACL_INVALID_FILE, "aclInit: configPath '%s' does not hold one JSON object", path);
    const char *mode = strstr(begin, "\"err_msg_mode\"");
    if (!mode)
        return 0;
    mode += strlen("\"err_msg_mode\"");
    mode += strspn(mode, " \t\r\n:\"");
    if (*mode != '0' && *mode != '1')
        return sim_fail(ACL_INVALID_FILE, "aclInit: err_msg_mode is neither 0 nor 1");
    sim_share_failures(*mode == '1');
    return 0;
}

static int start(const char *path)
{
    sim_share_failures(false);
    int code = path ? read_configuration(path) : 0;
    if (!code)
        code = sim_knobs_load();
    if (!code)
        code = sim_fault_at_call("aclInit", -1);
    if (code)
        return code;
    pthread_once(&fork_watched, watch_forks);
    sim_chance_start();
    sim_devices_open();
    sim_dereference_watch();
    atomic_store(&state, RUNNING);
    references = 1;
    return 0;
}

SIM_API aclError aclInit(const char *path)
{
    if (sim_forked())
        return refuse_fork("aclInit");
    pthread_mutex_lock(&lock);
    int code;
    if (sim_running()) {
        references++;
        code = sim_fail(ACL_REPEAT_INITIALIZE, "aclInit: called before; there are %lu references now",
                        (unsigned long)references);
    } else {
        code = start(path);
    }
    sim_count("calls.aclInit", 1);
    pthread_mutex_unlock(&lock);
    return code;
}

/* Under the lock. */
static int finish(const char *function)
{
    atomic_store(&state, ENDING);
    sim_hccl_finalize();
    int code = sim_devices_close(function);
    sim_ipc_close();
    sim_memory_close();
    sim_table_close();
    sim_dereference_forget();
    atomic_store(&state, ENDED);
    references = 0;
    return code;
}

static int check_running(const char *function)
{
    if (sim_forked())
        return refuse_fork(function);
    if (sim_running())
        return 0;
    if (atomic_load(&state) == NEVER)
        return sim_fail(ACL_UNINITIALIZE, "%s: aclInit was not called", function);
    return sim_fail(ACL_REPEAT_FINALIZE, "%s: ended before", function);
}

SIM_API aclError aclFinalize(void)
{
    int code = sim_enter_finalize(__func__);
    if (code)
        return code;
    pthread_mutex_lock(&lock);
    code = check_running(__func__);
    if (!code)
        code = finish(__func__);
    pthread_mutex_unlock(&lock);
    return code;
}

SIM_API aclError aclFinalizeReference(uint64_t *rest)
{
    int code = sim_enter_finalize(__func__);
    if (code)
        return code;
    pthread_mutex_lock(&lock);
    code = check_running(__func__);
    if (!code) {
        uint64_t left = references - 1;
        if (!left)
            code = finish(__func__);
        else
            references = left;
        if (rest)
            *rest = left;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

/* Python's lock, if there is a Python in the process and this thread holds it. */
static bool holds_interpreter(void)
{
    static _Atomic(int (*)(void)) found;
    int (*check)(void) = atomic_load(&found);
    if (!check) {
        int (*alive)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "Py_IsInitialized");
        check = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Check");
        if (!check || !alive || !alive())
            return false;
        atomic_store(&found, check);
    }
    return check() == 1;
}

int sim_blocks(const char *function)
{
    if (!holds_interpreter())
        return 0;
    return sim_misuse("gil_held", ACL_PARAM_INVALID, "%s: may wait, and the thread holds the interpreter lock",
                      function);
}

static void count_call(const char *function)
{
    char counter[80];
    snprintf(counter, sizeof counter, "calls.%s", function);
    sim_count(counter, 1);
}

/* aclFinalize has no context and must not be told that it was not initialised in the words of the others. */
int sim_enter_finalize(const char *function)
{
    int code = check_running(function);
    if (code)
        return code;
    count_call(function);
    code = sim_blocks(function);
    return code ? code : sim_fault_at_call(function, -1);
}

int sim_enter(const char *function, unsigned needs, struct sim_context **context)
{
    bool hccl = needs & SIM_HCCL;
    int misused = hccl ? 1 : ACL_PARAM_INVALID, unready = 15;
    if (sim_forked())
        return refuse_fork(function) ? misused : 0;
    if (!sim_running())
        return sim_fail(hccl ? unready : ACL_UNINITIALIZE, "%s: aclInit was not called", function);
    count_call(function);
    struct sim_context *current = sim_current_context();
    if (context)
        *context = current;
    if (needs & SIM_NEEDS_CONTEXT && !current)
        return sim_refuse("no_context", hccl ? unready : ACL_CONTEXT_NULL,
                          "%s: this thread has no context: aclrtSetDevice was not called on it, or was taken back",
                          function);
    if (needs & SIM_BLOCKS && sim_blocks(function))
        return misused;
    if (needs & SIM_FAULT_LATER)
        return 0;
    return sim_fault_at_call(function, current ? sim_context_device(current)->id : -1);
}

SIM_API const char *aclrtGetSocName(void)
{
    static char name[512];
    if (sim_enter(__func__, 0, NULL))
        return NULL;
    static pthread_mutex_t name_lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&name_lock);
    if (!*name)
        sim_knob_text(SIM_SOC, name, sizeof name);
    pthread_mutex_unlock(&name_lock);
    return name;
}

SIM_API aclError aclrtGetRunMode(int *mode)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!mode)
        return sim_fail(ACL_INVALID_PARAM, "aclrtGetRunMode: mode is null");
    *mode = 1;
    return 0;
}

SIM_API aclError aclrtDeviceGetBareTgid(int32_t *pid)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!pid)
        return sim_fail(ACL_INVALID_PARAM, "aclrtDeviceGetBareTgid: pid is null");
    *pid = (int32_t)getpid();
    return 0;
}

SIM_API aclError aclsysGetVersionStr(char *package, char *version)
{
    int code = sim_enter(__func__, 0, NULL);
    if (code)
        return code;
    if (!package || !version)
        return sim_fail(ACL_INVALID_PARAM, "aclsysGetVersionStr: null");
    strcpy(version, SIM_VERSION);
    return 0;
}

SIM_API aclError aclsysGetVersionNum(char *package, int32_t *version)
{
    int code = sim_enter(__func__, 0, NULL);
    if (code)
        return code;
    if (!package || !version)
        return sim_fail(ACL_INVALID_PARAM, "aclsysGetVersionNum: null");
    *version = 10000000; /* of 1.0.0 */
    return 0;
}

SIM_API const char *llmdd_sim_version(void)
{
    return SIM_VERSION;
}

bool sim_is_function(const char *name)
{
    static const char *const without_fault[] = {"aclGetRecentErrMsg", "aclrtPeekAtLastError", "aclrtGetLastError",
                                                "HcclGetErrorString"};
    if (strncmp(name, "acl", 3) && strncmp(name, "Hccl", 4))
        return false;
    for (size_t i = 0; i < sizeof without_fault / sizeof *without_fault; i++)
        if (!strcmp(name, without_fault[i]))
            return false;
    Dl_info own;
    if (!dladdr((void *)llmdd_sim_version, &own))
        return false;
    void *library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    bool known = library && dlsym(library, name);
    if (library)
        dlclose(library);
    return known;
}
